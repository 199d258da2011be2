"""Cyclic sampling: the shorter set is repeated until every row of the longer one was used.

    pair k = (forget row k mod F, retain row k mod R),    k = 0 … max(F, R) - 1

With many retain rows an epoch has many more steps than one-to-one sampling: compare methods at
equal steps, not at equal epochs. ``kinds`` restricts the retain rows, for the regimes with direct
or with indirect neighbours only.

Paper: arXiv 2509.05316. Reference code: github.com/praveensonu/MELU.
Deviation: rows are paired anew in every epoch; there, each retain row meets the same forget row
every time (``redraw: false``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from delible.errors import RecipeError
from delible.registry import register
from delible.train.randomness import shuffled
from delible.train.row import RetainKind, Row
from delible.train.slots import Sample


def cyclic_pairs(forget: Sequence[int], retain: Sequence[int]) -> list[tuple[int, int]]:
    """The table of pairs; each row of the longer sequence occurs once."""
    count = max(len(forget), len(retain))
    return [(forget[k % len(forget)], retain[k % len(retain)]) for k in range(count)]


@register(
    kind="sample",
    name="cyclic",
    title="Cyclic",
    summary="Repeats the shorter of forget and retain rows until all of the longer were used.",
    paper="2509.05316",
    year=2025,
    family="sampling",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain"),
    badges=("variant",),
    variant="Pairs are drawn anew in every epoch unless told otherwise.",
)
class Cyclic(Sample):
    """Options of cyclic sampling."""

    kinds: Annotated[tuple[RetainKind, ...], Field(min_length=1)] = Field(
        ("direct", "indirect", "general"), description="Kinds of retain rows that are used."
    )
    redraw: bool = Field(True, description="Pair anew in every epoch; false: by index, always.")

    def epoch(
        self,
        forget: Sequence[Row],
        retain: Sequence[Row],
        epoch: int,
        generator: torch.Generator,
    ) -> list[tuple[int, int | None]]:
        order = shuffled(range(len(forget)), generator)
        if not retain:
            return [(index, None) for index in order]
        pool = [index for index, row in enumerate(retain) if row.kind in self.kinds]
        if not pool:
            raise RecipeError(
                f"no retain row is of kind {' or '.join(self.kinds)}.",
                where="sample 'cyclic'",
                hint=f"There are: {', '.join(sorted({row.kind for row in retain}))}. A record "
                "with 'neighbour_of' is direct, one with another 'subject' is indirect.",
            )
        if not self.redraw:
            pairs = cyclic_pairs(range(len(forget)), pool)
            return list(shuffled(pairs, generator))
        return list(cyclic_pairs(order, shuffled(pool, generator)))
