"""Representation rerouting: its losses against float64 loops, its schedule, its first step."""

from __future__ import annotations

import math
from typing import Any, Literal

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.anatomy import spread
from delible.lm.lm import LM
from delible.methods.balance.linear import Linear
from delible.methods.keep.hidden_distance import HiddenDistance, hidden_distance
from delible.methods.objective.rr import RR, nudged, rerouting
from delible.testing.contract.trial import RECORDS
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.losses import State
from delible.train.recipe import Recipe
from delible.train.row import Row

TWO_BLOCKS = (0.0, 0.5)  # blocks 0 and 1 of three


def cosine(left: list[float], right: list[float]) -> float:
    product = sum(x * y for x, y in zip(left, right, strict=True))
    return product / math.sqrt(sum(x * x for x in left) * sum(y * y for y in right))


def expected_rerouting(lm: by_hand.LM, frozen: by_hand.LM, row: Row, loss: RR) -> float:
    total = 0.0
    for layer in (0, 1):
        own, was = by_hand.block_output(lm, row, layer), by_hand.block_output(frozen, row, layer)
        # the direction is whatever a nudge of a unit vector adds
        unit = nudged(torch.ones(1, 1, 32) / math.sqrt(32), 1.0, loss.nudge_seed, layer)
        direction = (unit - 1 / math.sqrt(32)).flatten().double().tolist()
        assert sum(x * x for x in direction) == pytest.approx(1, rel=1e-5)
        for mine, old in zip(own, was, strict=True):
            length = math.sqrt(sum(x * x for x in old))
            turned = [x + loss.nudge * length * u for x, u in zip(old, direction, strict=True)]
            total += max(0.0, cosine(mine, turned))
    return total / 2


@pytest.mark.parametrize("nudge", [0.0, 0.3])
def test_values_of_a_padded_batch_equal_float64_loops(nudge: float) -> None:
    lm, frozen = by_hand.tiny_lm(0.3), by_hand.tiny_lm()
    loss, rows = RR(depths=TWO_BLOCKS, nudge=nudge), by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows).tolist()
    expected = [expected_rerouting(lm, frozen, row, loss) for row in rows["forget"]]
    assert found == pytest.approx(expected, rel=1e-4)


def test_it_is_one_at_the_start_and_zero_when_orthogonal_or_opposite() -> None:
    states = by_hand.fixed_logits(0.3)
    positions = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    same = rerouting([states, 3 * states], [states, states], positions)
    torch.testing.assert_close(same, torch.tensor([6.0, 4.0, 2.0]), rtol=1e-6, atol=0)
    left, right = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    left[..., 0], right[..., 1] = 2.0, 3.0
    here = torch.tensor([[True]])
    assert float(rerouting([left], [right], here)) == 0
    assert float(rerouting([left], [-left], here)) == 0
    assert float(rerouting([left], [left + right], here)) == pytest.approx(2 / math.sqrt(13))
    # of the two blocks one is orthogonal: the mean, not the sum
    assert float(rerouting([left, left], [left, right], here)) == pytest.approx(0.5)


def test_the_gradient_is_that_of_the_formula_in_float64() -> None:
    states, frozen = by_hand.fixed_logits(0.2), by_hand.fixed_logits(0.5)
    positions = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    mine = states.float().requires_grad_(True)
    rerouting([mine], [frozen.float()], positions).sum().backward()
    other = states.clone().requires_grad_(True)
    dot = (other * frozen).sum(-1)
    value = (dot / other.pow(2).sum(-1).sqrt() / frozen.pow(2).sum(-1).sqrt()).clamp(min=0)
    (value * positions).sum().backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
    assert not mine.grad[1, 4:].any()


def first_gradient(nudge: float, seed: int = 0) -> Tensor:
    """Of the first step with an adapter whose product is zero, as in training."""
    lm = by_hand.LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    recipe = Recipe.named("rr").changed(
        {"objective": {"name": "rr", "depths": (0.0, 0.5), "nudge": nudge, "nudge_seed": seed}},
        {"place.last": 0.5, "keep.depth": 0.5},
    )
    trainer = Trainer(lm, recipe, RECORDS)
    placement = recipe.place.apply(trainer.rows())
    rows = by_hand.all_rows(lm)
    loss = recipe.objective
    reference = by_hand.prepared(lm, rows, loss)
    by_hand.values(lm, loss, reference, rows).sum().backward()  # type: ignore[no-untyped-call]
    parts = [p.grad.flatten() for p in placement.parameters.values() if p.grad is not None]
    return torch.cat(parts)


def test_without_the_nudge_the_first_step_has_no_gradient_and_with_it_it_has() -> None:
    still, moved, again = first_gradient(0.0), first_gradient(0.01), first_gradient(0.01)
    other = first_gradient(0.01, seed=1)
    assert float(moved.norm()) > 300 * float(still.norm())
    torch.testing.assert_close(moved, again)
    assert float(torch.cosine_similarity(moved, other, dim=0)) < 0.9
    # plain descent from there turns the states away, the loss being where it was to four digits
    lm = by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), RR(depths=TWO_BLOCKS)
    reference = by_hand.prepared(lm, rows, loss)
    tokens = sum(len(row.encoded.ids) for row in rows["forget"])
    seen = []
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.3)
    for _ in range(60):
        value = by_hand.values(lm, loss, reference, rows).sum() / tokens
        seen.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert seen[0] == pytest.approx(1, abs=2e-4)
    assert seen[-1] < 0.5


def test_nothing_above_the_last_target_is_reached_and_a_place_above_it_is_refused() -> None:
    lm, loss = by_hand.tiny_lm(0.1), RR(depths=TWO_BLOCKS)
    assert loss.reads(lm) == (0, 1)
    rows = by_hand.all_rows(lm)
    value = by_hand.values(lm, loss, by_hand.prepared(by_hand.tiny_lm(), rows, loss), rows).sum()
    reached = by_hand.gradients(lm, value)
    assert not [name for name in reached if name.startswith(("model.layers.2.", "lm_head."))]
    recipe = Recipe.named("rr").changed(
        {"objective": {"name": "rr", "depths": (0.0, 0.5)}}, {"place.first": 1, "place.last": 1}
    )
    with pytest.raises(RecipeError, match="could change nothing"):
        Trainer(by_hand.tiny_lm(), recipe, RECORDS).train()


def test_adapters_are_worn_up_to_the_last_target_only() -> None:
    lm = by_hand.tiny_lm()
    recipe = Recipe.named("rr").changed({}, {"place.last": 0.5})
    placement = recipe.place.apply(Trainer(lm, recipe, RECORDS).rows())
    blocks = {name.split(".layers.")[1].split(".")[0] for name in placement.parameters}
    assert blocks == {"0", "1"}
    with pytest.raises(RecipeError, match="first must not lie behind last"):
        Recipe.named("rr").changed({}, {"place.first": 0.9})


# ---- the schedule


def test_weights_move_in_a_straight_line() -> None:
    balance = Linear(forget_weight=10, forget_end=5, retain_weight=0, retain_end=5)
    assert balance.weights({}, 0.0) == (10, 0)
    assert balance.weights({}, 0.5) == (7.5, 2.5)
    for step in range(150):  # the released code: a (1 - step / 300) and a step / 300
        expected = (10 * (1 - step / 300), 10 * step / 300)
        assert balance.weights({}, step / 150) == pytest.approx(expected)


def test_progress_is_that_of_the_run_whatever_its_length() -> None:
    seen: list[float] = []

    class Watching(Linear):
        card = Linear.card

        def weights(self, state: State, progress: float) -> tuple[float, float]:
            seen.append(progress)
            return super().weights(state, progress)

    recipe = Recipe.named("rr").changed(
        {"balance": Watching()}, {"batch_size": 2, "epochs": 2, "training.precision": "float32"}
    )
    object.__setattr__(recipe, "balance", Watching())
    Trainer(by_hand.tiny_lm(), recipe, RECORDS).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]


# ---- the distance of retain states


@pytest.mark.parametrize(("likelihood", "relative"), [(0.0, "each"), (0.7, "each"), (0.7, None)])
def test_distances_of_a_padded_batch_equal_float64_loops(
    likelihood: float, relative: Literal["each"] | None
) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    loss = HiddenDistance(depth=0.5, blocks=None, likelihood=likelihood, relative=relative)
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows).sum()
    positions = sum(len(row.encoded.ids) for row in rows["retain"])
    tokens = sum(row.encoded.answer_tokens for row in rows["retain"])
    far = nats = 0.0
    for row in rows["retain"]:
        nats -= by_hand.row_sum(lm, row)
        for layer in (0, 1):
            own, was = (by_hand.block_output(one, row, layer) for one in (lm, frozen))
            for x, y in zip(own, was, strict=True):
                far += math.dist(x, y) / 2 / (math.hypot(*y) if relative else 1)
    assert float(found) / positions == pytest.approx(
        far / positions + likelihood * nats / tokens, rel=1e-4
    )
    # and the same however the step is cut
    parts = []
    for budget in (10**6, 1):
        passes = by_hand.passes_of(lm, RR(depths=(0.5,)), loss, reference, budget=budget)
        object.__setattr__(passes, "objective", None)
        passes.keep()
        parts.append(passes.totals.keep)
    assert parts == pytest.approx([float(found) / positions] * 2, rel=1e-5)


def test_distance_is_not_squared_ignores_padding_and_has_a_gradient_of_zero_at_zero() -> None:
    states = torch.zeros(1, 3, 2)
    states[0, 0] = torch.tensor([3.0, 4.0])
    states[0, 2] = math.nan  # padding may hold anything
    states.requires_grad_(True)
    frozen, positions = torch.zeros(1, 3, 2), torch.tensor([[True, True, False]])
    value = hidden_distance([states, states], [frozen, frozen], positions, relative=None)
    assert value.tolist() == [5.0]
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert states.grad[0].tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("last", "count", "expected"),
    [(7, 4, [1, 3, 5, 7]), (7, None, list(range(8))), (2, 9, [0, 1, 2]), (5, 1, [5])],
)
def test_held_blocks_are_spread_and_end_at_the_last(
    last: int, count: int | None, expected: list[int]
) -> None:
    assert spread(last, count) == expected


def test_the_paper_preset_has_the_papers_numbers() -> None:
    paper: Any = Recipe.named("rr@paper")
    assert (paper.place.rank, paper.place.alpha, paper.training.learning_rate) == (16, 16, 1e-4)
    assert (paper.training.max_steps, paper.training.batch_size) == (150, 16)
    assert paper.keep.blocks is None
    assert paper.balance.weights({}, 0.0) == (10, 0)
    assert paper.balance.weights({}, 1.0) == (5, 5)


def test_the_paper_presets_read_the_papers_blocks_of_32() -> None:
    anatomy = LM(tiny_model("llama", num_hidden_layers=32), tiny_tokenizer()).anatomy
    paper: Any = Recipe.named("rr@paper")
    assert [anatomy.layer_at(one) for one in paper.objective.depths] == [10, 20]
    assert [anatomy.layer_at(one) for one in RR().depths] == [10, 20]
    assert anatomy.layer_at(paper.place.last) == anatomy.layer_at(paper.keep.depth) == 20
    attacked: Any = Recipe.named("rmu_lat@paper")
    assert [anatomy.layer_at(one) for one in attacked.harden.depths] == [7]
    assert anatomy.layer_at(attacked.objective.depth) == 8
    elm: Any = Recipe.named("elm@paper")
    assert [anatomy.layer_at(one) for one in (elm.place.first, elm.place.last)] == [4, 7]
    reva: Any = Recipe.named("reva@paper")
    assert anatomy.layer_at(reva.objective.depth) == 18
    for name, first, last in (("mcu@paper", 6, 11), ("mcu_rmu@paper", 10, 10)):
        objective: Any = Recipe.named(name).objective
        assert anatomy.layer_at(objective.first_depth) == first
        assert anatomy.layer_at(objective.last_depth) == last
