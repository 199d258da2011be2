"""Retain losses: the authors' numbers, float64 loops, zero at the start."""

from __future__ import annotations

import math

import losses_by_hand as by_hand
import pytest
import torch

from delible.component import build
from delible.errors import RecipeError
from delible.methods.keep.hidden_mse import HiddenMSE
from delible.methods.keep.kl import KL, kl_from_reference
from delible.methods.keep.nll import NLL
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.train.losses import Keep
from delible.train.representation import squared_distance

KEEPS: list[Keep] = [NLL(), KL(), HiddenMSE(depth=0.5)]


def named(loss: Keep) -> str:
    return type(loss).__name__


def test_kl_gives_the_authors_number() -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_kl_divergence: mean of all positions
    own, frozen = by_hand.fixed_logits(0.2).flatten(0, 1), by_hand.fixed_logits(0.9).flatten(0, 1)
    # it sums positions and vocabulary and divides by the number of positions
    found = kl_from_reference(own, frozen)
    assert found.shape == (18,)
    assert float(found.mean()) == pytest.approx(0.7516738072355961, rel=1e-6)
    assert float(kl_from_reference(frozen, own).mean()) != pytest.approx(0.7516738, rel=1e-3)


def test_hidden_mse_gives_the_authors_number() -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/rmu.py, compute_activation_loss of one row
    states, frozen = by_hand.fixed_logits(0.2)[1:2], by_hand.fixed_logits(0.9)[1:2]
    found = squared_distance(states, frozen, torch.tensor([[True] * 5 + [False]])) / 5
    assert float(found) == pytest.approx(2.777907378409732, rel=1e-6)


def expected_value(loss: Keep, lm: by_hand.LM, frozen: by_hand.LM, row: by_hand.Row) -> float:
    if isinstance(loss, NLL):
        return -by_hand.row_sum(lm, row)
    if isinstance(loss, KL):
        total = 0.0
        own, was = by_hand.answer_logits(lm, row)[0], by_hand.answer_logits(frozen, row)[0]
        for z, z_ref in zip(own, was, strict=True):
            for token in range(len(z)):
                p_ref = by_hand.log_probability(z_ref, token)
                total += math.exp(p_ref) * (p_ref - by_hand.log_probability(z, token))
        return total
    own, was = by_hand.block_output(lm, row, 1), by_hand.block_output(frozen, row, 1)
    return sum(
        sum((x - y) ** 2 for x, y in zip(left, right, strict=True)) / len(left)
        for left, right in zip(own, was, strict=True)
    )


@pytest.mark.parametrize("loss", KEEPS, ids=named)
def test_values_of_a_padded_batch_equal_loops_over_rows_alone(loss: Keep) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    together = by_hand.values(lm, loss, reference, rows).tolist()
    expected = [expected_value(loss, lm, frozen, row) for row in rows["retain"]]
    assert together == pytest.approx(expected, rel=1e-5)
    for index, row in enumerate(rows["retain"]):
        alone = by_hand.values(lm, loss, reference, {"retain": [row]})
        assert float(alone) == pytest.approx(together[index], rel=1e-5)


@pytest.mark.parametrize("loss", KEEPS, ids=named)
def test_a_step_averages_over_answer_tokens_or_positions(loss: Keep) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    total = float(by_hand.values(lm, loss, reference, rows).detach().sum())
    whole = sum(len(row.encoded.ids) for row in rows["retain"])
    answers = whole - sum(row.encoded.start for row in rows["retain"])
    passes = by_hand.passes_of(lm, GradientAscent(), loss, reference)
    passes.keep()
    count = whole if isinstance(loss, HiddenMSE) else answers
    assert passes.totals.keep == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss", [KL(), HiddenMSE(depth=0.5)], ids=named)
def test_zero_with_zero_gradient_at_the_start_and_positive_after(loss: Keep) -> None:
    lm = by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(lm, rows, loss)
    start = by_hand.values(lm, loss, reference, rows)
    assert float(start.abs().max()) < 1e-5
    still = by_hand.joined(by_hand.gradients(lm, start.sum()))
    moved = by_hand.tiny_lm(0.05)
    after = by_hand.values(moved, loss, reference, rows)
    assert float(after.min()) > 1e-2
    pulled = by_hand.joined(by_hand.gradients(moved, after.sum()))
    assert float(still.norm() / pulled.norm()) < 1e-4


def test_kl_head_in_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), KL()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    found = []
    for elements in (10**9, 2 * 260 * 4):
        monkeypatch.setattr("delible.lm.forward.HEAD_CHUNK_ELEMENTS", elements)
        value = by_hand.values(lm, loss, reference, rows)
        found.append((value.detach(), by_hand.joined(by_hand.gradients(lm, value.sum()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_hidden_mse_reads_the_layer_at_its_depth() -> None:
    lm = by_hand.tiny_lm()
    assert HiddenMSE().reads(lm) == (0,)
    assert HiddenMSE(depth=0.5).reference_kinds(lm) == ("hidden.1",)
    with pytest.raises(RecipeError, match="depth"):
        build("keep", {"name": "hidden_mse", "depth": -0.1})


def test_hidden_mse_ignores_what_lies_in_the_padding() -> None:
    states, frozen = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    states[0, 2] = float("inf")
    assert squared_distance(states, frozen, torch.tensor([[True, True, False]])).tolist() == [2.0]
