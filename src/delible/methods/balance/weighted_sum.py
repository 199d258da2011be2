"""Weighted sum: loss = forget_weight * forget loss + retain_weight * retain loss."""

from __future__ import annotations

from pydantic import Field

from delible.registry import register
from delible.train.losses import State
from delible.train.slots import Balance


@register(
    kind="balance",
    name="weighted_sum",
    title="Weighted sum",
    summary="Adds both losses with constant weights.",
)
class WeightedSum(Balance):
    """Options of the weighted sum."""

    forget_weight: float = Field(1.0, ge=0, description="Weight of the forget loss.")
    retain_weight: float = Field(1.0, ge=0, description="Weight of the retain loss.")

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return self.forget_weight, self.retain_weight
