"""RMU: steers hidden states of forget rows, at one layer, towards a fixed random vector.

    loss = sum over positions of mean over hidden dimensions of (h_t - c * u)^2

with h the output of one block and u a random unit vector; averaged over all real positions of
the forget rows, prompt included. Later blocks cannot read states that all look the same.

The length c is constant in RMU (``adaptive=None``: ``steering``) and, in Adaptive RMU (default),
``adaptive`` times the mean norm of the reference model's states of the row at that layer: a
constant is only right for the model it was tuned on.

Paper: arXiv 2403.03218 (RMU), 2408.06223 (adaptive). Reference: github.com/centerforaisafety/wmdp,
github.com/locuslab/open-unlearning.
Deviations: padding does not count (the original averages over it), and every real position does,
so in chat rows the system prompt and the question too (open-unlearning's port looks at answer
positions only). Positions are averaged over the whole step, as in the original, not per row first,
as in that port. One random vector serves all forget rows, whatever their
topic. The adaptive length is taken per row (the paper) and not from the first batch (released
code), so that no batch decides it. The layer is a depth; 7 / 32 is layer 7 of a 32-layer model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.representation import Direction, control_vector, squared_distance
from delible.train.row import Unit
from delible.train.step import Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM


def mean_norm(
    states: Float[Tensor, "rows sequence hidden"], positions: Bool[Tensor, "rows sequence"]
) -> Float[Tensor, " rows"]:
    """Mean length of each row's states over its real positions."""
    norms: Tensor = torch.linalg.vector_norm(states.float(), dim=2) * positions
    return norms.sum(dim=1) / positions.sum(dim=1)


@register(
    kind="objective",
    name="rmu",
    title="Representation misdirection",
    summary="Steers the forget rows' hidden states at one layer towards a random vector.",
    paper="2403.03218",
    year=2024,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning: a few dozen steps bring the knowledge back",
    badges=("parity", "variant"),
    variant="All real positions count, prompts included and padding not; the adaptive length is "
    "taken per row.",
)
class RMU(Objective):
    """Options of RMU."""

    depth: float = Field(
        7 / 32, ge=0, le=1, description="Depth of the steered block: 0 the first, 1 the last."
    )
    adaptive: float | None = Field(
        3.0,
        gt=0,
        description="Target length in mean norms of the reference's states; none: `steering`.",
    )
    steering: float = Field(
        6.5, gt=0, description="Target length when `adaptive` is none; belongs to one model."
    )
    direction: Direction = Field("uniform", description="How the random vector is drawn.")
    seed: int = Field(0, ge=0, description="Seed of the random vector.")

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return (lm.anatomy.layer_at(self.depth),)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        layer = lm.anatomy.layer_at(self.depth)
        return () if self.adaptive is None else (f"hidden.{layer}",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        layer = forget.lm.anatomy.layer_at(self.depth)
        states, positions = forget.hidden(layer), forget.positions
        unit = control_vector(states.shape[2], self.direction, self.seed).to(states.device)
        length = states.new_full((len(forget.rows),), self.steering, dtype=torch.float32)
        if self.adaptive is not None:
            frozen = forget.reference.hidden(layer, states.shape[1])
            length = self.adaptive * mean_norm(frozen, positions)
        return squared_distance(states, (length[:, None] * unit)[:, None], positions)
