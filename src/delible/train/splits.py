"""Forget rows in sides or parts that share no fact: what one teaches says nothing of the others.

A row that tells facts of several parts (a text about a person of whom single facts are asked) is
in none of them: as a training row it would teach what is held out, and held out it would be
judged by what was trained. Parts depend on the rows and the seed only: they are the same for all
systems.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from delible.errors import DataError
from delible.measure.facts import Facts, facts_of
from delible.records import RecordBase
from delible.train.randomness import generator

#: Sides of the split in two.
TRAINED, HELD_OUT = "trained", "held out"


def split_by_fact(
    records: Sequence[RecordBase], share: float, seed: int
) -> tuple[list[RecordBase], list[RecordBase]]:
    """The rows to train on and the rows held out; disjoint in facts.

    Args:
        records: Forget rows.
        share: Fraction of the rows to train on, in (0, 1); reached to within one fact.
        seed: Of the order in which facts are taken.

    Raises:
        DataError: All rows are of one fact.
    """
    facts = facts_of(records)
    alone = [place for place, told in enumerate(facts.told) if not told]
    if len(alone) < 2:
        raise DataError(
            f"the {len(records)} forget rows are all of one fact and cannot be split in two.",
            where="attack 'relearn'",
            hint="Give rows of two facts or more, or relearn from other rows (rows: unrelated).",
        )
    order = torch.randperm(len(alone), generator=generator(seed, "relearn.split")).tolist()
    count = sum(len(facts.groups[place]) for place in alone)
    side: dict[int, str | int] = dict.fromkeys(alone, HELD_OUT)
    size = 0
    for position in order[:-1]:  # the last one is always held out
        more = len(facts.groups[alone[position]])
        # Stops where the count is closest to the share, but takes one fact at least.
        if size and size + more / 2 > share * count:
            break
        side[alone[position]] = TRAINED
        size += more
    where = _with_texts(facts, side)
    trained, held_out = (
        [record for index, record in enumerate(records) if where.get(index) == wanted]
        for wanted in (TRAINED, HELD_OUT)
    )
    return trained, held_out


def parts_by_fact(
    records: Sequence[RecordBase], parts: int, seed: int, *, whole_subjects: bool = False
) -> list[list[RecordBase]]:
    """The rows in parts of like size that share no fact; rows that tell facts of several left out.

    Args:
        records: Forget rows.
        parts: How many; no more than there are facts.
        seed: Of the order in which facts are dealt out.
        whole_subjects: Keep all facts of a subject in one part.

    Raises:
        DataError: All rows are of one fact (or subject).
    """
    facts = facts_of(records)
    alone = [place for place, told in enumerate(facts.told) if not told]
    units: list[list[int]] = [[place] for place in alone]
    if whole_subjects:
        units = _by_subject(records, facts, alone)
    if len(units) < 2:
        raise DataError(
            f"the {len(records)} forget rows are all of one "
            f"{'subject' if whole_subjects else 'fact'} and cannot be split in parts.",
            where="attack 'rtt'",
            hint="Give rows of two facts or more.",
        )
    parts = min(parts, len(units))
    order = torch.randperm(len(units), generator=generator(seed, "rtt.parts")).tolist()
    sizes, part = [0] * parts, dict[int, str | int]()
    for place in order:
        smallest = min(range(parts), key=lambda number: (sizes[number], number))
        for fact in units[place]:
            part[fact] = smallest
            sizes[smallest] += len(facts.groups[fact])
    where = _with_texts(facts, part)
    return [
        [record for index, record in enumerate(records) if where.get(index) == number]
        for number in range(parts)
    ]


def _by_subject(
    records: Sequence[RecordBase], facts: Facts, alone: Sequence[int]
) -> list[list[int]]:
    """Facts that share a subject, together; a fact without one stands alone."""
    found: list[tuple[set[Hashable], list[int]]] = []
    for place in alone:
        mine: set[Hashable] = {
            subject for row in facts.groups[place] if (subject := records[row].subject)
        } or {("fact", place)}
        members = [place]
        for other in [one for one in found if one[0] & mine]:
            found.remove(other)
            mine, members = mine | other[0], other[1] + members
        found.append((mine, sorted(members)))
    return sorted(members for _, members in found)


def _with_texts(facts: Facts, side: Mapping[int, str | int]) -> dict[int, str | int]:
    """The side of each row: that of its fact, and of a text the one side that it tells of."""
    known: dict[int, str | int | None] = dict(side)
    waiting = [place for place, told in enumerate(facts.told) if told]
    while ready := [place for place in waiting if facts.told[place] <= known.keys()]:
        for place in ready:
            sides = {known[told] for told in facts.told[place]}
            known[place] = sides.pop() if len(sides) == 1 else None
        waiting = [place for place in waiting if place not in known]
    return {
        row: mine
        for place, rows in enumerate(facts.groups)
        for row in rows
        if (mine := known.get(place)) is not None
    }


__all__ = ["parts_by_fact", "split_by_fact"]
