"""Questions with options for checks during a lesson, and the same facts in other words after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from delible.errors import DataError
from delible.generation.rows import question_of
from delible.records import QA, Choice, RecordBase
from delible.world import filters, templates

#: Wrong options of a question.
WRONG = 3


@dataclass(frozen=True)
class Item:
    """One fact as a question with options.

    Attributes:
        topic: Whom or what it is about (a knowledge component).
        choice: The question; the right option is the first.
        fact: SHA-256 of the record: the same in a check and in the test after it.
    """

    topic: str
    choice: Choice
    fact: str

    @property
    def key(self) -> str:
        """The right option."""
        return self.choice.options[self.choice.correct]


@dataclass(frozen=True)
class Exam:
    """What is asked of a student.

    Attributes:
        checks: After every turn.
        final: Before the lesson and after it, where there are several wordings in another one
            than the checks.
        reworded: How many of the final questions are in other words than the checks.
    """

    checks: tuple[Item, ...]
    final: tuple[Item, ...]
    reworded: int

    @property
    def topics(self) -> tuple[str, ...]:
        """What they are about."""
        return tuple(dict.fromkeys(item.topic for item in self.final))


def exam_of(
    records: Sequence[RecordBase], topics: Sequence[str] = (), *, seed: int = 0, limit: int = 24
) -> Exam:
    """The exam about records, or those of some topics.

    A record's own wrong answers are its options; where it has none, the answers of others and
    exchanged names are (templates).

    Args:
        topics: Subjects, whatever their case; none: all.
        limit: Facts at most, spread evenly.

    Raises:
        DataError: None of the records can be asked with options; says why.
    """
    wanted = {one.casefold() for one in topics}
    about = [one for one in records if not wanted or (one.subject or "").casefold() in wanted]
    if not about:
        known = sorted({one.subject for one in records if one.subject})
        raise DataError(
            f"no record is about {', '.join(topics)}." if topics else "there are no records.",
            where="the lesson's exam",
            hint=f"There are: {', '.join(known[:8])}." if known else "Give --exam FILE.",
        )
    checks, final, reworded = list[Item](), list[Item](), 0
    for record in about:
        options = _options(record, about, seed)
        pair = question_of(record)
        if options is None or pair is None:
            continue
        wordings = [pair.question, *pair.paraphrases]
        topic = record.subject or "the topic"
        for place, found in ((0, checks), (-1, final)):
            choice = Choice(question=wordings[place], options=options, correct=0, subject=topic)
            found.append(Item(topic, choice, record.digest))
        reworded += len(wordings) > 1
    if not checks:
        raise DataError(
            f"none of the {len(about)} records can be asked with options.",
            where="the lesson's exam",
            hint="Give questions with wrong answers ('perturbed') or options, at least two of "
            "different people.",
        )
    step = max(1, -(-len(checks) // limit))
    if step > 1:
        reworded = sum(a.choice.question != b.choice.question
                       for a, b in zip(checks[::step], final[::step], strict=True))  # fmt: skip
    return Exam(tuple(checks[::step]), tuple(final[::step]), reworded)


def _options(record: RecordBase, others: Sequence[RecordBase], seed: int) -> tuple[str, ...] | None:
    """The right answer and wrong ones; None where there is no wrong one."""
    if isinstance(record, Choice):
        wrong = [text for place, text in enumerate(record.options) if place != record.correct]
        return (record.options[record.correct], *wrong)
    pair = question_of(record)
    if pair is None:
        return None
    wrong = list(pair.perturbed) if isinstance(record, QA) else []
    if not wrong:
        known = [one for other in others if (one := question_of(other)) is not None]
        draw = Random(f"{seed}/exam/{record.digest}")
        wrong = templates.false_answers(pair, known, WRONG, draw, Counter())
    right = tuple(filters.words(pair.answer))
    wrong = [text for text in wrong if tuple(filters.words(text)) != right]
    return (pair.answer, *wrong[:WRONG]) if wrong else None


__all__ = ["Exam", "Item", "exam_of"]
