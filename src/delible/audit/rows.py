"""An attack's row of the matrix: empty, and put together from what it found on each system."""

from __future__ import annotations

from collections.abc import Sequence

from delible.audit.leaks import Setting
from delible.measure.attack import Attack, ConversationAttack, PromptAttack
from delible.records import RecordBase


def empty_row(attack: Attack) -> Setting:
    """An attack's row, still empty."""
    card = attack.card
    prompting = isinstance(attack, PromptAttack | ConversationAttack)
    return Setting(
        card.name,
        attack.variant_title(),
        card.title,
        family="prompt" if prompting else card.family or "",
        control=attack.control,
        weighs=attack.weighs,
        changes=card.changes or "",
        reads=attack.findings,
    )


def add(row: Setting, part: Setting) -> None:
    """Puts what an attack found on one system into the attack's row of all systems."""
    if row.values and part.values and digests(row.records) != digests(part.records):
        row.notes["skipped"] = "not run: the systems would be judged on different records"
        return
    row.records = part.records or row.records
    row.values |= part.values
    row.curves |= part.curves
    row.layers |= part.layers
    row.numbers |= part.numbers
    row.notes |= part.notes
    row.seconds += part.seconds
    row.queries += part.queries
    row.steps += part.steps
    row.tokens += part.tokens
    row.recovered = part.recovered or row.recovered
    row.splits = part.splits or row.splits


def digests(records: Sequence[RecordBase]) -> list[str]:
    """Which records these are."""
    return [record.digest for record in records]


__all__ = ["add", "digests", "empty_row"]
