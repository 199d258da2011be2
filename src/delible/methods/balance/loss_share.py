"""The loss that dominates weighs more: weights alpha and 1 - alpha of forget and retain loss.

    alpha = forget / (forget + retain), within [low, high]

While the forget loss is large it decides; as it settles, the retain loss takes over. With low =
high the weights are constant.

Paper: arXiv 2510.17210 (attention shifting). Reference code: none was found. Deviations: the paper
tells that alpha falls as the forget loss settles; the rule is a reconstruction. It is that of the
losses of the step before, of the whole step, so that micro-batches and processes do not matter;
the first step has the middle of the range.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from delible.registry import register
from delible.train.losses import State
from delible.train.slots import Balance


@register(
    kind="balance",
    name="loss_share",
    title="Share of the losses",
    summary="Weights forget and retain loss by how large the forget loss still is.",
    paper="2510.17210",
    year=2025,
    family="weighted sum",
    badges=("parity", "variant"),
    variant="By the losses of the step before.",
)
class LossShare(Balance):
    """Options of the share."""

    low: float = Field(0.2, ge=0, le=1, description="Least weight of the forget loss.")
    high: float = Field(0.8, ge=0, le=1, description="Largest weight of the forget loss.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self

    def start(self) -> State:
        return {"alpha": (self.low + self.high) / 2}

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return state["alpha"], 1 - state["alpha"]

    def observe(self, forget: float, keep: float | None, epoch: float, state: State) -> None:
        if keep is None:
            return
        own, other = max(forget, 0.0), max(keep, 0.0)
        if own + other > 0:
            state["alpha"] = min(self.high, max(self.low, own / (own + other)))
