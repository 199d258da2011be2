"""Balanced sampling: as many indirect neighbours as direct ones, then cyclic.

    retain rows of an epoch = D  +  a sample of I  +  G,       |sample of I| = |D|

Direct neighbours D are linked to a forgotten subject, indirect ones I are about other subjects,
G is general. Where indirect rows say whose neighbours they are, each subject gets as many as it
has direct ones; the rest is filled with indirect rows that are linked to nobody.

Paper: arXiv 2509.05316. Reference code: github.com/praveensonu/MELU.
Deviation: the sample of I is drawn anew in every epoch, so that all of them are used in time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from delible.errors import RecipeError
from delible.registry import register
from delible.train.randomness import shuffled
from delible.train.row import Row
from delible.train.slots import Sample


def balanced_rows(retain: Sequence[Row], generator: torch.Generator) -> list[int]:
    """Indices of the retain rows of one epoch, ascending: D, a sample of I as large, and G."""
    direct = [index for index, row in enumerate(retain) if row.kind == "direct"]
    general = [index for index, row in enumerate(retain) if row.kind == "general"]
    indirect = [index for index, row in enumerate(retain) if row.kind == "indirect"]
    room = Counter(retain[index].neighbour_of for index in direct)
    left = len(direct)
    taken: list[int] = []
    unlinked: list[int] = []
    for index in shuffled(indirect, generator):
        subject = retain[index].neighbour_of
        if subject is None:
            unlinked.append(index)
        elif room[subject] > 0:
            room[subject] -= 1
            left -= 1
            taken.append(index)
    return sorted([*direct, *taken, *unlinked[:left], *general])


@register(
    kind="sample",
    name="balanced",
    title="Balanced",
    summary="Cyclic over retain rows with as many indirect as direct neighbours.",
    paper="2509.05316",
    year=2025,
    family="sampling",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain"),
    badges=("variant",),
    variant="Pairs and the sample of indirect neighbours are drawn anew in every epoch.",
)
class Balanced(Sample):
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
        if not any(row.kind == "direct" for row in retain):
            raise RecipeError(
                "balanced sampling needs direct neighbours, and no retain row is one.",
                where="sample 'balanced'",
                hint="Give retain records with 'neighbour_of' (the forgotten subject they are "
                "linked to), or use sample: cyclic.",
            )
        drawn = shuffled(balanced_rows(retain, generator), generator)
        return [
            (order[k % len(order)], drawn[k % len(drawn)])
            for k in range(max(len(order), len(drawn)))
        ]
