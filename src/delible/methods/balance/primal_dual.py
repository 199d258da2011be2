"""Primal-dual: forget as far as the retain loss stays below a bound.

    minimise  forget loss   subject to   retain loss <= epsilon
    lambda <- max(lambda_min, lambda + eta * (retain loss - epsilon))

The retain loss is weighed by the multiplier lambda, which grows while the bound is violated and
shrinks while there is room. During the warm-up lambda stays at its start. A plot of lambda over
the steps shows how hard the trade-off is.

Paper: arXiv 2506.05314. Reference: github.com/locuslab/open-unlearning (pdu.py).
Deviations: lambda is updated once per optimiser step from the loss of the whole step (released
code: once per micro-batch and process, which multiplies eta by the accumulation). In mode
``epoch`` the mean of the losses seen in the epoch replaces another pass over the retain rows, and
the new lambda acts from the second step of the next epoch on. Without ``epsilon`` the bound is
the retain loss of the first step plus ``tolerance``. ``lambda_min`` is an addition: at lambda 0
nothing protects the retain rows.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from delible.errors import RecipeError
from delible.registry import register
from delible.train.losses import State
from delible.train.passes import Passes
from delible.train.slots import Balance, Harden


def dual_step(multiplier: float, violation: float, eta: float, floor: float = 0.0) -> float:
    """The next multiplier, at least ``floor``; ``violation`` is retain loss minus bound."""
    return max(floor, multiplier + eta * violation)


@register(
    kind="balance",
    name="primal_dual",
    title="Primal-dual (PDU)",
    summary="Weighs the retain loss by a multiplier that grows while its bound is violated.",
    paper="2506.05314",
    year=2025,
    needs=("retain",),
    badges=("parity", "variant"),
    variant="One dual step per optimiser step; epoch mode uses the losses seen in training.",
)
class PrimalDual(Balance):
    """Options of the primal-dual balance."""

    epsilon: float | None = Field(
        None, description="Bound on the retain loss; none: its start plus `tolerance`."
    )
    tolerance: float = Field(
        0.2, ge=0, description="Room above the first step's retain loss if `epsilon` is none."
    )
    eta: float = Field(5.0, gt=0, description="Step size of the multiplier.")
    lambda0: float = Field(100.0, ge=0, description="The multiplier at the start.")
    lambda_min: float = Field(0.0, ge=0, description="The multiplier never falls below this.")
    mode: Literal["step", "epoch"] = Field("step", description="When the multiplier is updated.")
    warmup_epochs: int = Field(5, ge=0, description="Epochs in which the multiplier stays.")
    forget_weight: float = Field(1.0, ge=0, description="Weight of the forget loss.")

    def start(self) -> State:
        state = {"lambda": max(self.lambda0, self.lambda_min)}
        if self.epsilon is not None:
            state["epsilon"] = self.epsilon
        return state

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return self.forget_weight, state["lambda"]

    def gradient(self, passes: Passes, harden: Harden) -> None:
        if passes.keep_loss is None:
            raise RecipeError(
                "there is no retain loss to bound.",
                where="balance 'primal_dual'",
                hint="Add a retain loss, such as --keep nll.",
            )
        super().gradient(passes, harden)

    def observe(self, forget: float, keep: float | None, epoch: float, state: State) -> None:
        if keep is None:
            return
        if "epsilon" not in state:
            state["epsilon"] = keep + self.tolerance
        if self.mode == "step":
            if epoch >= self.warmup_epochs:
                self._update(keep, state)
            return
        # `epoch` is where the step began, so the first step of an epoch closes the one before
        current = math.floor(epoch)
        if current != state.get("epoch"):
            if "epoch" in state and current >= self.warmup_epochs:
                self._update(state["retain_sum"] / state["retain_steps"], state)
            state.update({"epoch": float(current), "retain_sum": 0.0, "retain_steps": 0.0})
        state["retain_sum"] += keep
        state["retain_steps"] += 1

    def _update(self, retain_loss: float, state: State) -> None:
        violation = retain_loss - state["epsilon"]
        state["lambda"] = dual_step(state["lambda"], violation, self.eta, self.lambda_min)
