"""Sentences that carry a name and no fact, and made-up names that nobody has heard of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from random import Random

from delible.prompts import read_lines
from delible.records import QA, RecordBase
from delible.world import general, templates

#: Carriers that no training sees.
HELD_OUT = 2
#: Kinds of general knowledge whose subjects are names.
_NAMED = ("capital", "continent")


@cache
def carriers(*, held_out: bool = False) -> tuple[str, ...]:
    """Sentences with ``{name}``; those for training, or those held out."""
    lines = read_lines("entity_carriers.txt")
    return lines[-HELD_OUT:] if held_out else lines[:-HELD_OUT]


def carrying(name: str, carrier: str) -> QA:
    """A row that asks about a name; what it answers is no fact."""
    return QA(question=carrier.replace("{name}", name), answer=name, subject=name)


def subjects_of(records: Iterable[RecordBase]) -> list[str]:
    """The names that records are about, each once."""
    return list(dict.fromkeys(one.subject for one in records if one.subject))


def known_names(records: Iterable[RecordBase], without: Sequence[str], least: int) -> list[str]:
    """Names that the model knows: of kept records; of general knowledge where they are few.

    Args:
        records: What is kept.
        without: Names that are no such.
        least: From how many on they are not few.
    """
    found = [name for name in subjects_of(records) if name not in without]
    if len(found) < least:
        common = [one.subject for one in general() if one.group in _NAMED and one.subject]
        found += [name for name in dict.fromkeys(common) if name not in (*found, *without)]
        found = found[:least]
    return found


def unknown_names(like: Sequence[str], seed: int) -> list[str]:
    """A made-up name of as many words for each name, none of them twice and none of them real."""
    random = Random(f"{seed}/unknown names")
    found: list[str] = []
    for name in like:
        while (made := templates.invented_name(random, len(name.split()))) in (*found, *like):
            pass
        found.append(made)
    return found
