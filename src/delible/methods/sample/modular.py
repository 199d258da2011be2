"""Modular sampling (MELU): forget rows meet the neighbours of their own subject.

    for each subject e:   pair k = (F_e[k mod |F_e|], N_e[k mod |N_e|]),  k < max(|F_e|, |N_e|)
    for each other row g: (a random forget row, g)

F_e are the forget rows about e, N_e the retain rows that are linked to e (``neighbour_of``), so
each update sets a subject's private facts against exactly its own neighbourhood. An epoch has
sum over e of max(|F_e|, |N_e|) pairs, and one per other retain row.

Paper: arXiv 2509.05316. Reference code: github.com/praveensonu/MELU.
Deviations: (1) rows are paired anew in every epoch (``redraw: false`` pairs by index as released;
general rows draw their partner anew either way); (2) ``order: blocks`` keeps the pairs of a
subject together, which the released code, whose trainer shuffles the table, does not; (3) the
released table drops subjects with an empty side; here a forget row without neighbours meets a
random retain row, since otherwise it would not be forgotten, and a neighbour of a subject
without forget rows is general.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from delible.errors import RecipeError
from delible.registry import register
from delible.train.randomness import shuffled
from delible.train.row import RetainKind, Row
from delible.train.slots import Sample

_Pairs = list[tuple[int, int]]


def by_subject(
    forget: Sequence[Row], retain: Sequence[Row], kinds: Sequence[RetainKind]
) -> tuple[dict[str, tuple[list[int], list[int]]], list[int], list[int]]:
    """Groups rows by forgotten subject.

    Returns:
        For each subject with both sides its forget rows and its neighbours; the forget rows
        without neighbours; the other retain rows. Retain rows of other kinds are left out.
    """
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for index, row in enumerate(forget):
        if row.subject is not None:
            groups.setdefault(row.subject, ([], []))[0].append(index)
    general = []
    for index, row in enumerate(retain):
        if row.kind not in kinds:
            continue
        if row.neighbour_of is not None and row.neighbour_of in groups:
            groups[row.neighbour_of][1].append(index)
        else:
            general.append(index)
    modular = {subject: sides for subject, sides in groups.items() if sides[1]}
    alone = [
        index
        for index, row in enumerate(forget)
        if row.subject is None or row.subject not in modular
    ]
    return modular, alone, general


@register(
    kind="sample",
    name="modular",
    title="Modular, by entity (MELU)",
    summary="Pairs each forget row with neighbours of the same subject.",
    paper="2509.05316",
    year=2025,
    family="sampling",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain"),
    badges=("variant",),
    variant="Pairs are drawn anew in every epoch, and no forget row is dropped.",
)
class Modular(Sample):
    """Options of modular sampling."""

    order: Literal["shuffled", "blocks"] = Field(
        "shuffled", description="All pairs mixed, or the pairs of a subject one after the other."
    )
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
        modular, alone, general = by_subject(forget, retain, self.kinds)
        if not modular:
            missing = (
                "no forget record has a 'subject'"
                if all(row.subject is None for row in forget)
                else "no retain record is a neighbour of a forgotten subject"
            )
            raise RecipeError(
                f"modular sampling pairs rows by subject, and {missing}.",
                where="sample 'modular'",
                hint="Give forget records with 'subject' and retain records whose "
                "'neighbour_of' names it, or use sample: one_to_one.",
            )

        def drawn(count: int, below: Sequence[int]) -> list[int]:
            places = torch.randint(len(below), (count,), generator=generator).tolist()
            return [below[place] for place in places]

        blocks: list[_Pairs] = []
        for mine, neighbours in modular.values():
            if self.redraw:
                mine, neighbours = shuffled(mine, generator), shuffled(neighbours, generator)
            blocks.append(
                [
                    (mine[k % len(mine)], neighbours[k % len(neighbours)])
                    for k in range(max(len(mine), len(neighbours)))
                ]
            )
        used = [index for index, row in enumerate(retain) if row.kind in self.kinds]
        blocks.append(list(zip(alone, drawn(len(alone), used), strict=True)))
        partners = drawn(len(general), range(len(forget)))
        blocks.append(list(zip(partners, shuffled(general, generator), strict=True)))
        if self.order == "blocks":
            return [pair for block in shuffled(blocks, generator) for pair in block]
        return list(shuffled([pair for block in blocks for pair in block], generator))
