"""Linear schedule: the weights of both losses move in a straight line over the run.

    loss = (f0 + (f1 - f0) p) * forget loss + (r0 + (r1 - r0) p) * retain loss

with p the share of the run's steps that are done. Representation rerouting begins with the forget
loss alone and ends with both at the same weight.

Paper: arXiv 2406.04313. Reference code: github.com/GraySwanAI/circuit-breakers.
Deviations: the released code writes p = step / 300 whatever the length of the run and trains for
150 steps; these end weights, a / 2 and a / 2, are stated here, and the schedule fits any length.
A run that stops early has not reached them.
"""

from __future__ import annotations

from pydantic import Field

from delible.registry import register
from delible.train.losses import State
from delible.train.slots import Balance


def between(start: float, end: float, progress: float) -> float:
    """The value at ``progress`` (0 the start, 1 the end) on a straight line."""
    return start + (end - start) * progress


@register(
    kind="balance",
    name="linear",
    title="Linear schedule",
    summary="Moves the weights of both losses in a straight line over the steps of the run.",
    paper="2406.04313",
    year=2024,
    badges=("parity", "variant"),
    variant="Over the run's own steps instead of 300.",
)
class Linear(Balance):
    """Options of the linear schedule."""

    forget_weight: float = Field(1.0, ge=0, description="Weight of the forget loss at the start.")
    forget_end: float = Field(0.5, ge=0, description="Weight of the forget loss at the end.")
    retain_weight: float = Field(0.0, ge=0, description="Weight of the retain loss at the start.")
    retain_end: float = Field(0.5, ge=0, description="Weight of the retain loss at the end.")

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return (
            between(self.forget_weight, self.forget_end, progress),
            between(self.retain_weight, self.retain_end, progress),
        )
