"""Retain loss: how far hidden states of retain rows drift, in their own lengths.

    loss = sum over positions of |h_t - h_ref_t| / n,    n: mean of |h_ref_t| over all retain rows

with h the output of one block; averaged over all real positions. A length and not a square: small
drifts cost in proportion, so that they are taken back, too.

Paper: arXiv 2605.11685. Reference code: github.com/sustech-nlp/MCU.
Deviations: n is that of all retain rows that are used instead of the batch's, so that batches do
not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


def drift(
    states: Float[Tensor, "rows sequence hidden"],
    reference: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """Length of the difference, summed over real positions; 0 or more."""
    difference = torch.where(positions[..., None], states.float() - reference.float(), 0.0)
    return torch.linalg.vector_norm(difference, dim=2).sum(dim=1)


@register(
    kind="keep",
    name="hidden_drift",
    title="Drift of retain rows' states",
    summary="Holds retain rows' hidden states at one layer, by how far they drift in their "
    "lengths.",
    paper="2605.11685",
    year=2026,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="The mean length is that of all retain rows.",
)
class HiddenDrift(Keep):
    """Options of the drift."""

    depth: float = Field(
        11 / 31, ge=0, le=1, description="Depth of the held block: 0 the first, 1 the last."
    )

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return (lm.anatomy.layer_at(self.depth),)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return (f"hidden.{lm.anatomy.layer_at(self.depth)}",)

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        (kind,) = self.reference_kinds(lm)
        keys = dict.fromkeys(row.key for row in rows["retain"])
        return {
            "length": torch.cat([reference.get(kind, k).norm(dim=1) for k in keys]).mean()[None]
        }

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        layer = retain.lm.anatomy.layer_at(self.depth)
        states = retain.hidden(layer)
        frozen = retain.reference.hidden(layer, states.shape[1])
        length = float(retain.reference.learned(self.full_name, "length"))
        return drift(states, frozen, retain.positions) / length
