"""Twins of records about somebody who does not exist, with an answer that is nobody's.

The question keeps its form, the name is drawn anew, and so are the names, numbers and things of
the answer. What a system says to a twin it cannot know from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from delible.records import QA, RecordBase
from delible.world.filters import words
from delible.world.templates import exchanged, invented_name, subject_of
from delible.world.told import names_of, renamed


def twins(records: Iterable[RecordBase], seed: int) -> list[QA]:
    """The twins of all records that have one, in their order; one subject has one twin.

    A record has none where nobody is named in its question, or where nothing in its answer can be
    drawn anew.
    """
    given = [one for one in records if isinstance(one, QA)]
    invented: dict[str, str] = {}
    taken = {word for one in given for word in words(f"{one.question} {one.answer}")}
    found = []
    for record in given:
        subject = subject_of(record)
        if subject is None:
            continue
        if subject not in invented:
            invented[subject] = _stranger(subject, taken, seed)
        twin = _twin(record, names_of(subject, ()), invented[subject], seed)
        if twin is not None:
            found.append(twin)
    return found


def _stranger(subject: str, taken: set[str], seed: int) -> str:
    """A name of as many words that occurs nowhere."""
    for attempt in range(100):
        name = invented_name(Random(f"{seed}/{subject}/{attempt}"), len(subject.split()))
        if not set(words(name)) & taken:
            break
    return name


def _twin(record: QA, names: Sequence[str], name: str, seed: int) -> QA | None:
    question = renamed(record.question, names, name)
    answer = renamed(record.answer, names, name)
    if question == record.question:
        return None
    named = record.model_copy(update={"question": question, "answer": answer, "subject": name})
    answer = exchanged(named, Random(f"{seed}/{question}"))
    if answer == named.answer:
        return None
    return QA(question=question, answer=answer, subject=name, group=record.group)
