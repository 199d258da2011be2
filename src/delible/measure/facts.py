"""Which records are of one fact, and which texts tell facts of other records.

Rows of one fact have in common: subject and relation; subject and an answer, alias or other form
of the answer; a question or a declared paraphrase of one. So have all rows of a subject about
which there is a passage without relation. Texts are compared by their words: case, accents and
punctuation do not count.

A row tells another one's fact if its answer has more than half of the key words of the other
answer (names and numbers, else content words; not the subject's own name) and the row is about
the same: the same subject, or else the names in the other one's question. Rows that tell each
other's facts ("A is the mother of B", "B is the child of A") are of one fact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from delible.names import fold
from delible.records import QA, Choice, Dialogue, Passage, RecordBase
from delible.system.questions import answer_of
from delible.world import filters

#: What the generator of rows from a name calls the texts that it made; and an answer of more
#: words than this is a text.
TEXT_GROUP, TEXT_WORDS = "passage", 40


def _plain(text: str) -> str:
    return " ".join(fold(text).words()) or text.strip()


def _answers(record: RecordBase) -> list[str]:
    """Everything that says a record's fact."""
    if isinstance(record, Passage):
        return []
    if isinstance(record, Choice):
        return [record.options[record.correct]]
    said = [answer_of(record)]
    if isinstance(record, QA):
        said += [*record.aliases, *record.paraphrased_answers]
    return said


def fact_keys(record: RecordBase) -> Iterator[Hashable]:
    """What a record shares with the other records of the same fact."""
    if record.subject and record.group:
        yield "relation", record.subject, record.group
    if isinstance(record, Passage):
        yield "text", _plain(record.text)
        return
    asked = list[str]()
    if isinstance(record, QA):
        asked = [record.question, *record.paraphrases]
    elif isinstance(record, Choice):
        asked = [record.question]
    elif isinstance(record, Dialogue):
        yield "messages", record.messages[:-1]
        turns = [turn.text for turn in record.messages if turn.role == "user"]
        asked = turns if len(turns) == 1 else []  # a later turn asks nothing by itself
    for question in asked:
        yield "question", _plain(question)
    for answer in _answers(record):
        yield "answer", record.subject, _plain(answer)


class _Joined:
    """Indices that are joined into groups."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self.parent[second] = first

    def groups(self) -> dict[int, list[int]]:
        """Each group by its first index, in order."""
        found: dict[int, list[int]] = {}
        for index in range(len(self.parent)):
            found.setdefault(self.root(index), []).append(index)
        return found


def fact_numbers(records: Sequence[RecordBase]) -> tuple[int, ...]:
    """Records of one fact have the same number; so has a record that is given twice.

    Unlike in :func:`facts_of` a text is a fact of its own, and an answer alone joins only records
    of one subject.
    """
    joined, first = _Joined(len(records)), dict[Hashable, int]()
    for index, record in enumerate(records):
        for key in (("same", record.digest), *fact_keys(record)):
            if not isinstance(key, tuple) or key[:2] != ("answer", None):
                joined.join(first.setdefault(key, index), index)
    place = {root: number for number, root in enumerate(joined.groups())}
    return tuple(place[joined.root(index)] for index in range(len(records)))


@dataclass(frozen=True)
class Facts:
    """The facts of some records.

    Attributes:
        groups: Indices of records by fact: each index once, in the order of their first record.
        told: Per group, the places of the other facts that its texts tell.
    """

    groups: list[list[int]]
    told: list[frozenset[int]]


def facts_of(records: Sequence[RecordBase]) -> Facts:
    """Records by fact, and which of them tell facts of others."""
    whole = {r.subject for r in records if isinstance(r, Passage) and r.subject and not r.group}
    joined, first = _Joined(len(records)), dict[Hashable, int]()
    for index, record in enumerate(records):
        keys = list(fact_keys(record))
        if record.subject in whole:  # a biography holds all facts of its subject
            keys.append(("subject", record.subject))
        for key in keys:
            joined.join(first.setdefault(key, index), index)
    tells = _tells(records)
    while True:
        between = {(joined.root(one), joined.root(other)) for one, other in tells}
        mutual = [(one, other) for one, other in between if one < other and (other, one) in between]
        if not mutual:
            break
        for one, other in sorted(mutual):
            joined.join(one, other)
    groups = joined.groups()
    place = {root: number for number, root in enumerate(groups)}
    told: list[set[int]] = [set() for _ in groups]
    for one, other in between:
        if one != other:
            told[place[one]].add(place[other])
    return Facts(list(groups.values()), [frozenset(one) for one in told])


def fact_groups(records: Sequence[RecordBase]) -> list[list[int]]:
    """Indices of records by fact: each index once, groups in the order of their first record."""
    return facts_of(records).groups


@dataclass(frozen=True)
class _Words:
    """A record as words: all of it, its answer, the names it is asked by, what says its fact."""

    all: frozenset[str]
    answer: frozenset[str]
    asked: frozenset[str]
    wanted: tuple[frozenset[str], ...]


def _words(record: RecordBase) -> _Words:
    def read(text: str) -> frozenset[str]:
        # names of two parts ("Al-Lund") are also compared in one piece
        return frozenset((*filters.words(text), *filters.key_words("", text)))

    question = ""
    if isinstance(record, QA | Choice):
        question = record.question
    elif isinstance(record, Dialogue):
        question = " ".join(turn.text for turn in record.messages[:-1])
    answers = _answers(record)
    said = record.text if isinstance(record, Passage) else " ".join(answers)
    named = read(record.subject or "")
    if record.group == TEXT_GROUP or len(filters.words(said)) > TEXT_WORDS:
        answers = []  # a text tells facts and has none of its own
    wanted = (frozenset(filters.key_words(question, answer)) - named for answer in answers)
    return _Words(
        read(f"{question} {said}"),
        read(said),
        frozenset(filters.key_words("", question)),
        tuple(keys for keys in wanted if keys),
    )


def _tells(records: Sequence[RecordBase]) -> set[tuple[int, int]]:
    """Pairs of records of which the first tells the fact of the second."""
    read = [_words(record) for record in records]
    found = set()
    for one, text in enumerate(read):
        for other, fact in enumerate(read):
            if one == other or not any(
                len(keys & text.answer) > filters.MAXIMUM_SHARED * len(keys) for keys in fact.wanted
            ):
                continue
            subject = records[other].subject
            same = subject is not None and subject == records[one].subject
            if same or (fact.asked and fact.asked <= text.all):
                found.add((one, other))
    return found
