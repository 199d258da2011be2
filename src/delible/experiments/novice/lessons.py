"""What a class is taught and asked: lessons in turns, exams in other words, what stands before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from delible.measure.evaluate import Rewrite
from delible.records import QA, Choice, Message, RecordBase
from delible.system.asks import Prompt
from delible.teaching.turns import lesson, other_lesson


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


__all__ = ["Class", "before_question", "exam", "lesson", "other_lesson"]
