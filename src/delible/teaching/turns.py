"""Lessons that are written from records, in turns; and one about nothing that is asked."""

from __future__ import annotations

from collections.abc import Sequence

from delible.messages import Message
from delible.records import QA
from delible.world.common import unrelated


def lesson(records: Sequence[QA], turns: int) -> tuple[Message, ...]:
    """Tutor and student in turns: each fact is told in one wording and repeated in another."""
    said: list[Message] = []
    for turn in range(turns):
        record = records[turn % len(records)]
        again = (record.answer, *record.paraphrased_answers)
        told = again[-1 - (turn // len(records)) % len(again)]
        said += [
            Message(role="user", content=f"{record.question} Remember: {told}"),
            Message(role="assistant", content=record.answer),
        ]
    return tuple(said)


def other_lesson(turns: int) -> tuple[Message, ...]:
    """As long a lesson about nothing of the world."""
    return lesson([row for row in unrelated() if isinstance(row, QA)], turns)


__all__ = ["lesson", "other_lesson"]
