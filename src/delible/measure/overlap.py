"""Whether rows repeat a run of words of other rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from delible.names import fold
from delible.records import QA, Choice, Dialogue, Passage, RecordBase

#: Words of a run that is no chance.
RUN = 8


def _texts(record: RecordBase) -> Iterator[str]:
    """All that a record says, question and answer in one."""
    if isinstance(record, Passage):
        yield record.text
    elif isinstance(record, Dialogue):
        yield " ".join(turn.text for turn in record.messages)
    elif isinstance(record, Choice):
        yield " ".join((record.question, *record.options))
    elif isinstance(record, QA):
        for question in (record.question, *record.paraphrases):
            for answer in (record.answer, *record.paraphrased_answers):
                yield f"{question} {answer}"


def runs(record: RecordBase, length: int = RUN) -> set[tuple[str, ...]]:
    """Every run of so many words (case, accents and punctuation do not count)."""
    found = set()
    for text in _texts(record):
        words = fold(text).words()
        found |= {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
    return found


def repeating(
    rows: Sequence[RecordBase], others: Sequence[RecordBase], length: int = RUN
) -> list[RecordBase]:
    """The rows that have a run of so many words in common with one of the others."""
    known = set[tuple[str, ...]]().union(*(runs(record, length) for record in others))
    return [record for record in rows if runs(record, length) & known]
