"""The inverted hinge loss: by the definition in loops, its gradient, and what the paper says."""

from __future__ import annotations

import math

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.lm import forward
from delible.lm.lm import LM
from delible.methods.objective.ihl import IHL
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.hinge import inverted_hinge


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def expected(logits: list[float], target: int) -> tuple[float, list[float]]:
    """Value, and gradient by the logits: dp_i / dz_k = p_i (1[i = k] - p_k), twice."""
    p = probabilities(logits)
    runner = max((v for v in range(len(p)) if v != target), key=p.__getitem__)
    gradient = [
        p[target] * ((k == target) - p[k]) - p[runner] * ((k == runner) - p[k])
        for k in range(len(p))
    ]
    return 1 + p[target] - p[runner], gradient


def positions() -> tuple[Tensor, Tensor]:
    labels = torch.tensor(by_hand.LABELS)[:, 1:]
    picked = by_hand.fixed_logits(0.4)[:, :-1][labels != -100]
    return picked.requires_grad_(True), labels[labels != -100]


def test_value_and_gradient_by_the_definition() -> None:
    logits, targets = positions()
    found = inverted_hinge(logits, targets)
    found.sum().backward()
    assert logits.grad is not None
    wanted = [expected(z, y) for z, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    assert found.tolist() == pytest.approx([value for value, _ in wanted], rel=1e-12)
    for row, (_, gradient) in zip(logits.grad.tolist(), wanted, strict=True):
        assert row == pytest.approx(gradient, rel=1e-9, abs=1e-12)


def test_bounds_and_the_tie() -> None:
    certain = torch.tensor([[90.0, 0.0, 0.0], [0.0, 90.0, 0.0], [5.0, 5.0, 0.0]]).double()
    found = inverted_hinge(certain, torch.tensor([0, 0, 0]))
    assert found.tolist() == pytest.approx([2.0, 0.0, 1.0], abs=1e-9)


def test_two_tokens_move_most_and_in_opposite_directions() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.5, -2.0]]).double().requires_grad_(True)
    inverted_hinge(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    (gradient,) = logits.grad.tolist()
    assert gradient[0] > 0.1
    assert gradient[1] < -0.1
    assert max(abs(one) for one in gradient[2:]) < 0.1 * min(gradient[0], -gradient[1])


@pytest.mark.parametrize("chunk", [7, 10**9])
def test_rows_are_sums_over_their_answer_tokens(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    monkeypatch.setattr(forward, "HEAD_CHUNK_ELEMENTS", chunk * lm.vocabulary)
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, IHL(), by_hand.Reference(), rows)
    for value, row in zip(found.tolist(), rows["forget"], strict=True):
        logits, targets = by_hand.answer_logits(lm, row)
        wanted = sum(expected(z, y)[0] for z, y in zip(logits, targets, strict=True))
        assert value == pytest.approx(wanted, rel=1e-4)
