"""The search for values: against a slow one in float64, one text at a time, with its own Adam."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from editing import FAMILIES, double, first_of, hooked, make_edits, make_lm, weights_of
from torch import Tensor

from delible.edit import values
from delible.edit.requests import Edit, read_edits
from delible.edit.values import Passing, Settings, clamped, find_values
from delible.intervene.sites import Site
from delible.lm.lm import LM

LAYER = 1
SETTINGS = Settings(steps=4, learning_rate=0.3, clamp=0.2, weight_decay=0.5, kl=2.0, enough=0.0)
BEGINNINGS = ("The old town is",)


def start_of(lm: LM, edits: list[Edit], what: str) -> Tensor:
    """z_0, by a hook."""
    found = []
    twin = double(lm)
    for edit in edits:
        text = edit.texts[0]
        seen = []
        with (
            torch.no_grad(),
            hooked(module_of(twin, what), lambda _, __, out, seen=seen: seen.append(first_of(out))),
        ):
            twin.core(input_ids=torch.tensor([list(text.row.ids)]))
        found.append(seen[0].reshape(len(text.row.ids), -1)[text.places[0]])
    return torch.stack(found)


def module_of(lm: LM, what: str) -> torch.nn.Module:
    block = lm.core.get_submodule(lm.anatomy.block_path(LAYER))
    return block if what == "block" else block.get_submodule(lm.anatomy.mlp)


def logits(lm: LM, ids: tuple[int, ...], places: tuple[int, ...], delta: Tensor, what: str) -> Any:
    def add(_: Any, __: Any, output: Any) -> Any:
        old = first_of(output)
        flat = old.reshape(-1, old.shape[-1])
        mask = torch.zeros(len(flat), 1, dtype=delta.dtype)
        mask[list(places)] = 1
        new = (flat + mask * delta).reshape(old.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with hooked(module_of(lm, what), add):
        return lm.core(input_ids=torch.tensor([list(ids)])).logits[0]


def slow_loss(lm: LM, edit: Edit, delta: Tensor, norm: Tensor, what: str, s: Settings) -> Tensor:
    """The loss of one edit, text by text."""
    terms = []
    for text in edit.texts:
        said = logits(lm, text.row.ids, text.places, delta, what).log_softmax(-1)
        answer = range(text.row.start, len(text.row.ids))
        terms.append(-torch.stack([said[at - 1, text.row.ids[at]] for at in answer]).mean())
    place = edit.essence.places[0]
    ids = edit.essence.row.ids[: place + 1]
    now = logits(lm, ids, (place,), delta, what)[place].log_softmax(-1)
    then = logits(lm, ids, (place,), delta.detach() * 0, what)[place].log_softmax(-1)
    kl = (now.exp() * (now - then)).sum()
    length = delta.norm() if bool(delta.any()) else delta.sum() * 0
    return torch.stack(terms).mean() + s.kl * kl + s.weight_decay * length / norm


def slow_search(lm: LM, edit: Edit, start: Tensor, what: str, s: Settings) -> tuple[Tensor, float]:
    twin = double(lm)
    unit = start.norm() / len(start) ** 0.5
    scaled = torch.zeros_like(start, requires_grad=True)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, s.steps + 1):
        loss = slow_loss(twin, edit, scaled * unit, start.norm(), what, s)
        if step == s.steps:
            break
        (gradient,) = torch.autograd.grad(loss, [scaled])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
        new = (scaled - s.learning_rate * first / (1 - 0.9**step) / corrected).detach()
        length = float((new * unit).norm())
        if length > s.clamp * float(start.norm()):
            new = new * s.clamp * float(start.norm()) / length
        scaled = new.requires_grad_(True)
    return (scaled * unit).detach(), float(loss.detach())


@torch.no_grad()
def slow_probability(lm: LM, edit: Edit, delta: Tensor, what: str) -> Any:
    """Geometric mean over the target's tokens, mean over texts."""
    twin, means = double(lm), []
    for text in edit.texts:
        said = logits(twin, text.row.ids, text.places, delta, what).softmax(-1)
        answer = range(text.row.start, len(text.row.ids))
        each = torch.stack([said[at - 1, text.row.ids[at]] for at in answer])
        means.append(float(each.prod()) ** (1 / len(each)))
    return pytest.approx(sum(means) / len(means), rel=1e-2)


@pytest.mark.parametrize("what", ["block", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_equal_those_of_a_slow_search_in_float64(
    family: str, what: Literal["block", "mlp"]
) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    edits = make_edits(lm, beginnings=BEGINNINGS)
    start = start_of(lm, edits, what)
    found = find_values(lm, edits, Site(what=what, layers=(LAYER,)), start, SETTINGS)
    for place, edit in enumerate(edits):
        delta, loss = slow_search(lm, edit, start[place], what, SETTINGS)
        torch.testing.assert_close(
            found.delta[place], delta, rtol=5e-3, atol=5e-3 * float(delta.abs().max())
        )
        assert found.losses[place] == pytest.approx(loss, rel=1e-4)
        assert found.probabilities[place] == slow_probability(lm, edit, delta, what)
    assert all(torch.equal(value, before[name]) for name, value in lm.core.named_parameters())
    assert all(one.requires_grad for one in lm.model.parameters())


def test_what_the_value_is_added_to_is_the_blocks_output() -> None:
    lm = make_lm()
    edits = make_edits(lm)
    torch.testing.assert_close(
        read_edits(lm, edits, [LAYER]).outputs, start_of(lm, edits, "block"), rtol=1e-4, atol=1e-5
    )


def test_edits_do_not_depend_on_each_other_or_on_batches() -> None:
    lm = make_lm()
    edits = make_edits(lm, ("No.", "I really could not say", "Who?"), beginnings=BEGINNINGS)
    start = read_edits(lm, edits, [LAYER]).outputs
    site = Site(what="block", layers=(LAYER,))
    together = find_values(lm, edits, site, start, SETTINGS)
    lm.budget = type(lm.budget)(1, lm.budget.cached_tokens, lm.budget.rows)
    apart = find_values(lm, edits, site, start, SETTINGS)
    torch.testing.assert_close(together.delta, apart.delta, rtol=1e-3, atol=1e-4)
    assert together.losses == pytest.approx(apart.losses, rel=1e-4)


def test_an_edit_that_has_reached_its_target_stays() -> None:
    lm = make_lm()
    edits = make_edits(lm)
    start = read_edits(lm, edits, [LAYER]).outputs
    site = Site(what="block", layers=(LAYER,))
    once = Settings(steps=1, learning_rate=0.3, kl=0.0, weight_decay=0.0)
    first = find_values(lm, edits, site, start, once)
    assert first.steps == [0, 0]
    assert not bool(first.delta.any())
    easy, hard = sorted(range(2), key=lambda place: first.losses[place])
    enough = (first.losses[easy] + first.losses[hard]) / 2
    assert first.losses[easy] < enough - 1e-3
    found = find_values(
        lm, edits, site, start,
        Settings(steps=5, learning_rate=0.01, kl=0.0, weight_decay=0.0, enough=enough),
    )  # fmt: skip
    assert found.steps[easy] == 0
    assert not bool(found.delta[easy].any())
    assert found.losses[easy] == pytest.approx(first.losses[easy])
    assert found.steps[hard] > 0
    assert found.losses[hard] < first.losses[hard]


def test_the_change_never_exceeds_the_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    edits = make_edits(lm)
    start = read_edits(lm, edits, [LAYER]).outputs
    ratios: list[float] = []
    whole = Passing.__call__

    def watched(self: Passing, delta: Tensor) -> tuple[Tensor, Tensor]:
        ratios.extend((delta.detach().norm(dim=1) / start.norm(dim=1).float()).tolist())
        return whole(self, delta)

    monkeypatch.setattr(values.Passing, "__call__", watched)
    settings = Settings(steps=6, learning_rate=5.0, clamp=0.3, enough=0.0)
    found = find_values(lm, edits, Site(what="block", layers=(LAYER,)), start, settings)
    assert len(ratios) == 12
    assert max(ratios) == pytest.approx(0.3, rel=1e-4)
    assert max(ratios) <= 0.3 * (1 + 1e-5)
    assert bool((found.delta.norm(dim=1) <= 0.3 * start.norm(dim=1) * (1 + 1e-5)).all())


def test_clamped() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = clamped(delta, torch.tensor([2.0, 2.0, 2.0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
