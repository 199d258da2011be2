"""Minor components (MCU): representations change, but not along what many samples share.

    C_l   = [mean; top K - 1 main directions] of the forget rows' states at layer l, orthonormal
    p(x)  = x - C_l^T C_l x
    MLP-Breaking:  mean over layers, positions of max(floor, <p(m_t), p(m0_t)> / n_l^2)
    RMU:           mean over layers, positions of mean over hidden dimensions of (p(h_t) - v)^2

m is what the MLP of a block gives, h its output, m0 the reference's, n_l the mean length of p(m0)
over all forget positions, and v one random vector. Relearning a few samples restores the mean and
the main directions, and what was moved along them with it; minor components come back slowly.
``components: 0`` is the base loss.

Paper: arXiv 2605.11685. Reference code: github.com/sustech-nlp/MCU.
Deviations: the mean is not orthogonal to the main directions, so that taking out one after the
other leaves some of it; here they are made orthonormal (``faithful: true`` is the released way).
n_l is that of all forget rows instead of the batch's, so that batches do not matter. K grows with
the width (``components: null``: a 128th of it, at least 4); the published 8 and 32 belong to a
width of 4,096. RMU's target is measured in n_l (``relative``), as a constant fits one model only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.reference import Reference
from delible.train.representation import (
    control_vector,
    leading_directions,
    share_without_first,
    squared_distance,
    without_directions,
    without_first,
)
from delible.train.row import Row, Unit
from delible.train.step import Reads, Step
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


def mlp_breaking(
    states: Float[Tensor, "rows sequence hidden"],
    reference: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
    length: float,
    floor: float,
) -> Float[Tensor, " rows"]:
    """max(floor, <m, m0> / length^2), summed over positions."""
    product = torch.where(positions[..., None], states.float() * reference.float(), 0.0).sum(dim=2)
    bounded = (product / length**2).clamp(min=floor)
    return torch.where(positions, bounded, 0.0).sum(dim=1)


def sums(
    values: Sequence[Float[Tensor, "sequence hidden"]],
) -> tuple[Float[Tensor, " hidden"], Float[Tensor, "hidden hidden"], int]:
    """Sum, sum of outer products and number of the states of rows, without the first of each."""
    width = values[0].shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    moment = torch.zeros(width, width, dtype=torch.float64)
    for value in values:
        states = value[1:].double()
        total += states.sum(dim=0)
        moment += states.T @ states
    return total, moment, sum(len(value) - 1 for value in values)


@register(
    kind="objective",
    name="mcu",
    title="Minor components (MCU)",
    summary="Breaks MLP outputs or steers states, outside the directions that samples share.",
    paper="2605.11685",
    year=2026,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning of all layers: the paper's attack tunes the lower ones only",
    badges=("parity", "variant"),
    variant="Directions are orthonormal; lengths are those of all forget rows; K grows with the "
    "width.",
)
class MCU(Objective):
    """Options of minor components."""

    base: Literal["mlp_breaking", "rmu"] = Field(
        "mlp_breaking", description="The loss that is taken in minor components."
    )
    components: int | None = Field(
        None, ge=0, description="Directions that are taken out, the mean's included; none: a 128th "
        "of the width, at least 4.",
    )  # fmt: skip
    faithful: bool = Field(
        False, description="Take out directions one after the other without making them orthogonal."
    )
    first_depth: float = Field(6 / 31, ge=0, le=1, description="Depth of the first block.")
    last_depth: float = Field(11 / 31, ge=0, le=1, description="Depth of the last block.")
    floor: float = Field(0.0, description="MLP-Breaking: where a position has no more to lose.")
    length: float = Field(1.0, gt=0, description="RMU: length of the random vector.")
    relative: bool = Field(
        True, description="RMU: the length is in mean lengths of the projected states."
    )
    seed: int = Field(0, ge=0, description="RMU: seed of the random vector.")

    unit: ClassVar[Unit] = "position"

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first_depth > self.last_depth:
            raise ValueError("first_depth is above last_depth")
        return self

    def _layers(self, lm: LM) -> range:
        anatomy = lm.anatomy
        return range(anatomy.layer_at(self.first_depth), anatomy.layer_at(self.last_depth) + 1)

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        inside = self.base == "mlp_breaking"
        return tuple(f"mlp.{layer}" if inside else layer for layer in self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        where = "mlp" if self.base == "mlp_breaking" else "hidden"
        return tuple(f"{where}.{layer}" for layer in self._layers(lm))

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        found = {}
        keys = list(dict.fromkeys(row.key for row in rows["forget"]))
        for layer, kind in zip(self._layers(lm), self.reference_kinds(lm), strict=True):
            values = [reference.get(kind, key) for key in keys]
            total, moment, count = sums(values)
            wanted = self.components
            if wanted is None:
                wanted = max(4, len(total) // 128)
            directions = leading_directions(
                total, moment, count, wanted, orthonormal=not self.faithful
            )
            lengths = [without_directions(value[1:], directions).norm(dim=1) for value in values]
            found[f"directions.{layer}"] = directions
            found[f"length.{layer}"] = torch.cat(lengths).mean()[None]
        return found

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        positions, found = without_first(forget.positions), []
        for layer in self._layers(forget.lm):
            directions = forget.reference.learned(self.full_name, f"directions.{layer}")
            length = float(forget.reference.learned(self.full_name, f"length.{layer}"))
            if self.base == "rmu":
                states = without_directions(forget.hidden(layer).float(), directions)
                size = self.length * (length if self.relative else 1.0)
                vector = size * control_vector(states.shape[2], "uniform", self.seed).to(states)
                found.append(squared_distance(states, vector[None, None], positions))
                continue
            states = without_directions(forget.mlp(layer).float(), directions)
            frozen = forget.reference.mlp(layer, states.shape[1])
            frozen = without_directions(frozen, directions)
            found.append(mlp_breaking(states, frozen, positions, length, self.floor))
        return torch.stack(found).mean(dim=0) * share_without_first(step, "forget")
