"""What a class is taught and asked: lessons in turns, exams in other words, what stands before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from delible.measure.evaluate import Rewrite
from delible.records import QA, Choice, Message, RecordBase
from delible.system.asks import Prompt
from delible.world.common import unrelated


def exam(records: Sequence[QA]) -> list[Choice]:
    """Four options each, asked in the last wording (the stop of unlearning looks at the first)."""
    return [
        Choice(
            question=(record.question, *record.paraphrases)[-1],
            options=(record.answer, *record.perturbed[:3]),
            correct=0,
            subject=record.subject,
        )
        for record in records
        if record.perturbed
    ]


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


def before_question(turns: Mapping[str, Sequence[Message]], persona: str | None) -> Rewrite:
    """Puts the persona and the lesson about a record's subject before its question.

    Args:
        turns: Lessons by subject; ``""`` is that of every other record.
        persona: The system turn; None: none.
    """
    system = () if persona is None else (Message(role="system", content=persona),)

    def rewrite(record: RecordBase, prompt: Prompt) -> list[Prompt]:
        heard = turns.get(record.subject or "", turns.get("", ()))
        return [replace(prompt, messages=(*system, *heard, *prompt.messages))]

    return rewrite


@dataclass(frozen=True)
class Class:
    """Who is forgotten and who is kept, with all their facts."""

    forget: Mapping[str, Sequence[QA]]
    kept: Mapping[str, Sequence[QA]]

    @property
    def forget_rows(self) -> list[QA]:
        return [row for rows in self.forget.values() for row in rows]

    @property
    def kept_rows(self) -> list[QA]:
        return [row for rows in self.kept.values() for row in rows]
