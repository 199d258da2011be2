"""The primal-dual balance: the dual rule, and a problem whose answer is known."""

from __future__ import annotations

import losses_by_hand as by_hand
import pytest
import torch

from delible.component import build
from delible.errors import RecipeError
from delible.methods.balance.primal_dual import PrimalDual, dual_step
from delible.methods.balance.weighted_sum import WeightedSum
from delible.methods.harden.none import NoHarden
from delible.methods.keep.nll import NLL
from delible.methods.objective.margin_flattening import MarginFlattening
from delible.train.losses import State
from delible.train.slots import Balance


def watched(balance: PrimalDual, losses: list[float], per_epoch: int = 1) -> list[float]:
    """Multipliers after each observed retain loss."""
    state = balance.start()
    seen = []
    for step, loss in enumerate(losses):
        balance.observe(1.0, loss, step / per_epoch, state)
        seen.append(state["lambda"])
    return seen


def test_the_multiplier_takes_the_authors_path() -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/pdu.py, final_loss_value
    balance = PrimalDual(epsilon=0.3, eta=5, lambda0=1, warmup_epochs=0)
    found = watched(balance, [0.5, 0.9, 0.1, 0.0, -0.4, 0.35])
    assert found == pytest.approx([2.0, 5.0, 4.0, 2.5, 0.0, 0.25], abs=1e-12)


def test_a_constant_violation_moves_the_multiplier_by_equal_steps() -> None:
    rising = PrimalDual(epsilon=0.5, eta=2, lambda0=1, warmup_epochs=0)
    assert watched(rising, [0.6] * 3) == pytest.approx([1.2, 1.4, 1.6])
    falling = PrimalDual(epsilon=0.5, eta=2, lambda0=0.5, warmup_epochs=0)
    assert watched(falling, [0.4] * 4) == pytest.approx([0.3, 0.1, 0.0, 0.0], abs=1e-12)
    held = falling.model_copy(update={"lambda_min": 0.2})
    assert watched(held, [0.4] * 3) == pytest.approx([0.3, 0.2, 0.2])
    assert dual_step(1.0, -10.0, 1.0) == 0.0


def test_the_multiplier_stays_during_the_warm_up() -> None:
    balance = PrimalDual(epsilon=0.0, eta=1, lambda0=10, warmup_epochs=2)
    found = watched(balance, [1.0] * 7, per_epoch=3)
    assert found == [10, 10, 10, 10, 10, 10, 11]


def test_epoch_mode_moves_once_per_epoch_by_the_epochs_mean() -> None:
    balance = PrimalDual(epsilon=1.0, eta=1, lambda0=10, warmup_epochs=2, mode="epoch")
    losses = [9.0, 9.0, 2.0, 4.0, 1.0, 1.5, 7.0]
    found = watched(balance, losses, per_epoch=2)
    # the first epoch ends before the warm-up does, the second with it
    assert found == pytest.approx([10, 10, 10, 10, 12, 12, 12.25])


def test_without_a_bound_the_start_and_the_tolerance_make_one() -> None:
    balance = PrimalDual(tolerance=0.2, eta=1, lambda0=1, warmup_epochs=0)
    state = balance.start()
    assert "epsilon" not in state
    balance.observe(1.0, 0.7, 0.0, state)
    assert state["epsilon"] == pytest.approx(0.9)
    assert state["lambda"] == pytest.approx(0.8)
    balance.observe(1.0, 1.4, 1.0, state)
    assert state["epsilon"] == pytest.approx(0.9)
    assert state["lambda"] == pytest.approx(1.3)


@pytest.mark.parametrize("mode", ["step", "epoch"])
def test_a_copied_state_goes_on_as_if_nothing_had_happened(mode: str) -> None:
    balance = build("balance", {"name": "primal_dual", "mode": mode, "warmup_epochs": 1})
    losses = [0.5, 1.5, 0.2, 0.9, 1.1, 0.1, 2.0]
    whole = watched(balance, losses, per_epoch=2)
    state: State = balance.start()
    for step, loss in enumerate(losses):
        state = {name: float(value) for name, value in state.items()}  # as from a checkpoint
        balance.observe(0.0, loss, step / 2, state)
    assert state["lambda"] == whole[-1]
    assert len(set(whole)) > 1


def test_a_step_without_retain_rows_changes_nothing() -> None:
    balance = PrimalDual(epsilon=0.1, warmup_epochs=0)
    state = balance.start()
    balance.observe(1.0, None, 0.0, state)
    assert state == balance.start()


def test_a_retain_loss_is_required() -> None:
    lm = by_hand.tiny_lm()
    passes = by_hand.passes_of(lm, MarginFlattening(), None, by_hand.Reference())
    with pytest.raises(RecipeError, match="retain loss"):
        PrimalDual().gradient(passes, NoHarden())


def test_with_a_constant_multiplier_it_is_the_weighted_sum() -> None:
    lm, found = by_hand.tiny_lm(), []
    balances: list[Balance] = [
        PrimalDual(lambda0=7.0, forget_weight=0.5),
        WeightedSum(forget_weight=0.5, retain_weight=7.0),
    ]
    for balance in balances:
        passes = by_hand.passes_of(
            lm, MarginFlattening(), NLL(), by_hand.Reference(),
            weights=balance.weights(balance.start(), 0.0),
        )  # fmt: skip
        passes.clear()
        balance.gradient(passes, NoHarden())
        found.append(torch.cat([p.grad.flatten() for p in passes.parameters if p.grad is not None]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("lambda0", [0.0, 10.0])
def test_a_constrained_quadratic_ends_at_its_solution(lambda0: float) -> None:
    # minimise (x - 3)^2 subject to x^2 <= 1: x = 1 and, from 2 (x - 3) + 2 lambda x = 0, lambda = 2
    balance = PrimalDual(epsilon=1.0, eta=0.05, lambda0=lambda0, warmup_epochs=1)
    state, x = balance.start(), 0.0
    for step in range(2000):
        forget_weight, retain_weight = balance.weights(state, 0.0)
        slope = forget_weight * 2 * (x - 3) + retain_weight * 2 * x
        if step == 20:
            assert state["lambda"] == lambda0  # the warm-up is over now
        balance.observe((x - 3) ** 2, x**2, step / 20, state)
        x -= 0.05 * slope
    assert x == pytest.approx(1, rel=0.05)
    assert state["lambda"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    "options", [{"eta": 0}, {"mode": "batch"}, {"lambda0": -1}, {"tolerance": -0.1}, {"lamda0": 1}]
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        build("balance", {"name": "primal_dual", **options})
