"""Retain loss: hidden states of retain rows stay where the reference model had them.

    loss = sum over positions of mean over hidden dimensions of (h_t - h_ref_t)^2

with h the output of one block; averaged over all real positions of the retain rows, prompt
included. The retain half of RMU: give it the same ``depth`` as the objective.

Paper: arXiv 2403.03218. Reference: github.com/centerforaisafety/wmdp.
Deviations: padding does not count (the original averages over it); prompts do (open-unlearning's
port looks at answer positions only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group, Reads

if TYPE_CHECKING:
    from delible.lm.lm import LM


def hidden_mse(
    states: Float[Tensor, "rows sequence hidden"],
    reference: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """Squared difference per row, mean over hidden, sum over real positions; 0 or more."""
    difference = torch.where(positions[..., None], states.float() - reference.float(), 0.0)
    return difference.pow(2).mean(dim=2).sum(dim=1)


@register(
    kind="keep",
    name="hidden_mse",
    title="Hidden states of retain rows",
    summary="Holds the retain rows' hidden states at one layer where the reference had them.",
    paper="2403.03218",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="All real positions count, prompts included and padding not.",
)
class HiddenMSE(Keep):
    """Options of the hidden-state loss."""

    depth: float = Field(
        7 / 32, ge=0, le=1, description="Depth of the held block: 0 the first, 1 the last."
    )

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return (lm.anatomy.layer_at(self.depth),)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return (f"hidden.{lm.anatomy.layer_at(self.depth)}",)

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        layer = retain.lm.anatomy.layer_at(self.depth)
        states = retain.hidden(layer)
        reference = retain.reference.hidden(layer, states.shape[1])
        return hidden_mse(states, reference, retain.positions)
