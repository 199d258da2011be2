"""What is asked, what the model said, and what a reward says about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from delible.errors import DataError
from delible.records import QA, RecordBase
from delible.system.asks import Prompt
from delible.system.questions import answer_of, ask, has_answer

#: ``forget``: must not be answered any more; ``boundary``: close to it, and must be answered.
Tag = Literal["forget", "boundary"]


@dataclass(frozen=True)
class Question:
    """A question of an on-policy run.

    Attributes:
        prompt: What the model sees.
        tag: Which regime of a reward it belongs to.
        text: The question alone, for judges and leak checks.
        answer: The true answer; empty where nobody knows it.
        aliases: Other true answers.
        subject: Whom or what it is about.
    """

    prompt: Prompt
    tag: Tag
    text: str
    answer: str = ""
    aliases: tuple[str, ...] = ()
    subject: str | None = None

    @classmethod
    def of(cls, record: RecordBase, tag: Tag) -> Question | None:
        """A record as a question; None where it asks nothing (a passage)."""
        prompt = ask(record)
        if prompt is None or prompt.text is not None or not prompt.messages:
            return None
        answer = answer_of(record) if has_answer(record) else ""
        aliases = record.aliases if isinstance(record, QA) else ()
        text = prompt.messages[-1].text
        return cls(prompt, tag, text, answer, aliases, record.subject)

    @cached_property
    def known(self) -> QA | None:
        """The question with its answer, for what looks for leaks; None without an answer."""
        if not (self.text.strip() and self.answer.strip()):
            return None
        return QA(
            question=self.text, answer=self.answer, aliases=self.aliases, subject=self.subject
        )


def questions_of(records: Iterable[RecordBase], tag: Tag) -> list[Question]:
    """Records as questions, those that ask nothing left out.

    Raises:
        DataError: None of them asks anything.
    """
    given = list(records)
    found = [one for record in given if (one := Question.of(record, tag)) is not None]
    if given and not found:
        raise DataError(
            f"none of the {len(given)} {tag} records asks a question.",
            where="on-policy training",
            hint="Give question-answer or multiple-choice records, or dialogues.",
        )
    return found


@dataclass(frozen=True)
class Completion:
    """What the model said to a question.

    Attributes:
        text: As a reader sees it: without special tokens, after any prefill.
        tokens: Every token that was drawn, the one that ends the answer included.
        finished: It ended by itself, not by the limit of its length.
    """

    question: Question
    text: str
    tokens: tuple[int, ...] = ()
    finished: bool = True


@dataclass(frozen=True)
class Scored:
    """A reward's word about a completion.

    Attributes:
        value: Higher is wanted more; None: there is no value (a judge failed), and the completion
            neither gains nor loses.
        hits: What was found in the text, for reports: forbidden entities, refusal phrases.
        reason: Why there is no value.
    """

    value: float | None
    hits: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Total:
    """All rewards of one completion.

    Attributes:
        value: The sum, times the gates; None where a part has no value.
        parts: By name of the reward.
    """

    value: float | None
    parts: dict[str, Scored] = field(default_factory=dict)

    def hits(self) -> tuple[str, ...]:
        """What all rewards found."""
        return tuple(hit for part in self.parts.values() for hit in part.hits)


def subjects_of(questions: Sequence[Question]) -> list[str]:
    """Subjects of the forget questions, each once."""
    return list(dict.fromkeys(q.subject for q in questions if q.tag == "forget" and q.subject))


__all__ = [
    "Completion", "Question", "Scored", "Tag", "Total", "questions_of", "subjects_of",
]  # fmt: skip
