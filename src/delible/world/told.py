"""What records tell of whom: people by their names, facts as edges of a graph, descriptions.

Rows of a world are read exactly (subject, relation, value). Of other questions and answers the
subject is the one given, or else the first name of two words in the question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from delible.records import QA, RecordBase
from delible.world import filters
from delible.world.relations import Relation, fill, relations
from delible.world.templates import subject_of

#: Stands for somebody who is not named.
SOMEBODY = "this person"
#: Sentences of a description at most.
SENTENCES = 3
#: A surname shorter than this is not looked for by itself.
SURNAME = 4


@dataclass(frozen=True)
class Edge:
    """A fact: somebody, how they are related to a value, and the record that tells it."""

    subject: str
    relation: Relation
    value: str
    record: QA

    @property
    def name(self) -> str:
        """The relation's name."""
        return self.relation.name


def relation_of(record: RecordBase) -> Relation | None:
    """The relation of the world that a row is about; None for rows of other data."""
    if not isinstance(record, QA) or record.subject in (None, record.answer):
        return None  # a question for the subject itself tells the fact the other way round
    known = relations()
    if record.group in known:
        return known[record.group]
    name = record.subject or ""
    asked = (one for one in known.values() if fill(one.question, name) == record.question)
    return next(asked, None)


def value_of(record: QA) -> str:
    """The bare answer: the first alias that the answer has in it, else the answer."""
    return next((one for one in record.aliases if filters.says(record.answer, one)), record.answer)


def edges(records: Iterable[RecordBase]) -> list[Edge]:
    """The facts of a world's rows, each once, in their order."""
    found: dict[tuple[str, str, str], Edge] = {}
    for record in records:
        relation = relation_of(record)
        if relation is not None and isinstance(record, QA) and record.subject:
            value = value_of(record)
            key = (record.subject, relation.name, value)
            found.setdefault(key, Edge(record.subject, relation, value, record))
    return list(found.values())


def person_of(record: RecordBase) -> str | None:
    """Whom a record is about."""
    return subject_of(record) if isinstance(record, QA) else record.subject


def aliases_of(name: str, records: Iterable[RecordBase]) -> tuple[str, ...]:
    """Other names of somebody: those beside the name in an answer or in the aliases of one."""
    found: dict[str, None] = {}
    for record in records:
        if isinstance(record, QA) and name in record.aliases:
            # the name comes first, and a nickname follows it; a wrong reading masks too much
            found |= dict.fromkeys(one for one in record.aliases if one != name)
        elif isinstance(record, QA) and record.answer == name:
            found |= dict.fromkeys(record.aliases)
    return tuple(found)


def names_of(name: str, records: Iterable[RecordBase]) -> tuple[str, ...]:
    """The name, its aliases and the surname, the longest first."""
    *_, last = name.split()
    surname = (last,) if last != name and len(last) >= SURNAME else ()
    found = dict.fromkeys((name, *aliases_of(name, records), *surname))
    return tuple(sorted(found, key=len, reverse=True))


def renamed(text: str, names: Sequence[str], other: str) -> str:
    """The text with every name replaced, longer ones first, as whole words.

    A sentence that began with the name begins with a capital again.
    """
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(
            rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: other, text, flags=re.IGNORECASE
        )
    return text[:1].upper() + text[1:]


def named_in(text: str, names: Iterable[str]) -> bool:
    """Whether a text has one of the names, word by word, in any case."""
    return any(filters.says(text, name) for name in names)


def statement(record: QA) -> str:
    """A record's fact as a sentence: the world's, an answer that names its subject, or both."""
    relation = relation_of(record)
    if relation is not None:
        return fill(relation.sentence, record.subject or "", value_of(record))
    subject = subject_of(record)
    if subject and filters.says(record.answer, subject):
        return record.answer
    end = "" if record.answer.endswith((".", "!", "?")) else "."
    return f"{record.question} {record.answer}{end}"


def description(record: QA, records: Iterable[RecordBase], names: Sequence[str]) -> str | None:
    """Who a record is about, by other facts that are told of them, without a name.

    Args:
        records: Where those facts are taken from; none of them says the record's own answer.
        names: All names of the subject.

    Returns:
        At most three sentences about "this person"; None where nothing else is told.
    """
    subject = subject_of(record)
    others = [
        one
        for one in records
        if isinstance(one, QA) and one != record and subject and subject_of(one) == subject
        and one.question != record.question
    ]  # fmt: skip
    usable: list[str] = []
    for one in others:
        told = renamed(statement(one), names, SOMEBODY)
        if told not in usable and not named_in(told, names) and not filters.leaks(record, told):
            usable.append(told)
        if len(usable) == SENTENCES:
            break
    return " ".join(usable) or None
