"""One-to-one sampling: each forget row, in random order, meets one random retain row.

Retain rows are drawn without replacement until all were used, then again, anew in every epoch:
no forget row keeps its partner. (In a published loader the draw is seeded with the row's index,
so that only as many retain rows as forget rows are ever seen.)

Paper: arXiv 2401.06121 (the pairing of TOFU), studied in arXiv 2509.05316.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from delible.registry import register
from delible.train.randomness import shuffled
from delible.train.row import Row
from delible.train.slots import Sample


def draw(count: int, available: int, generator: torch.Generator) -> list[int]:
    """``count`` indices below ``available``, each used once before any is used again."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += shuffled(range(available), generator)
    return drawn[:count]


@register(
    kind="sample",
    name="one_to_one",
    title="One-to-one",
    summary="Each forget row meets one random retain row per epoch, another one each time.",
    paper="2401.06121",
    year=2024,
    needs=("forget",),
)
class OneToOne(Sample):
    """Has no options."""

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
        return list(zip(order, draw(len(order), len(retain), generator), strict=True))
