"""Editors that write only along directions that ordinary text and earlier edits hardly use.

    (P (K K^T + M) + L2) X = P K,    Delta = R X^T

P projects onto the directions in which ordinary keys have next to no second moment, M is the sum
of k k^T over the keys of all earlier edits, L2 is rho times the mean of k^T P k, or a number.

Paper: arXiv 2410.02355.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.closed_form import Map, factors, projector, squares
from delible.edit.keys import consecutive_layers
from delible.edit.located import Layers, LocatedEditor
from delible.edit.requests import Edit
from delible.edit.spread import spread
from delible.edit.statistics import Scale, Statistics, null_shares, null_spaces
from delible.edit.writing import Writing
from delible.lm.lm import LM


class NullSpaceEditor(LocatedEditor):
    """Options that these editors share."""

    first_depth: float = Field(
        0.14, ge=0, le=1, description="Relative depth of the first edited layer."
    )
    last_depth: float = Field(
        0.27, ge=0, le=1, description="Relative depth of the last edited layer."
    )
    layers: Layers = Field(
        None,
        description="Consecutive layer indices, instead of depths; negative: from the end; traced: "
        "as many layers, around the one that causal tracing finds.",
    )
    scale: Scale = Field(
        "energy",
        description="What the threshold is a share of: the sum of all singular values (energy), "
        "the largest one, or nothing (absolute, as in the paper with 0.02).",
    )
    threshold: float = Field(
        0.03,
        gt=0,
        description="Directions with smaller singular values may be written to; with energy: the "
        "smallest ones that together hold this share.",
    )
    rho: float = Field(
        0.05, gt=0, description="L2 as a share of k^T P k: the larger, the weaker the change."
    )
    l2: float | None = Field(
        None, gt=0, le=1e9, description="L2 as a number (1 in the paper), instead of rho."
    )
    clamp: float = Field(3.0, gt=0, description="Longest change of a value, as a share of it.")
    weight_decay: float = Field(0.01, ge=0, description="Weight of the value's change.")

    @property
    def traces(self) -> bool:
        return self.layers == "traced"

    def chosen_layers(self, lm: LM, traced: int | None) -> list[int]:
        given = None if isinstance(self.layers, str) else self.layers
        found = consecutive_layers(
            lm.anatomy, self.first_depth, self.last_depth, given, f"editor '{self.name}'"
        )
        return found if traced is None else lm.anatomy.around(traced, len(found))

    def prepare(
        self, lm: LM, layers: Sequence[int], statistics: Statistics | None, notes: dict[str, object]
    ) -> dict[int, Map]:
        assert statistics is not None
        nulls = null_spaces(statistics, self.threshold, self.scale, f"editor '{self.name}'")
        notes["null_space_share"] = null_shares(nulls)
        return {layer: projector(null.to(lm.device)) for layer, null in nulls.items()}

    def write(
        self,
        lm: LM,
        edits: Sequence[Edit],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
        prepared: dict[int, Map],
    ) -> dict[str, object]:
        def factors_of(layer: int, keys: Tensor) -> Tensor:
            within = prepared[layer]
            l2 = self.l2 or self.rho * float(squares(keys, within).mean())
            return factors(keys, within, l2, changes[layer].protected)

        spread(lm, edits, wanted, changes, factors_of)
        return {}
