"""Records as question-answer pairs, and pairs of records that belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from delible.errors import DataError
from delible.records import QA, Choice, Dialogue, Passage, RecordBase
from delible.system.questions import has_answer
from delible.train.losses import Role

#: A passage of fewer words cannot be asked about.
SHORTEST_PASSAGE = 4


def question_of(record: RecordBase) -> QA | None:
    """The record as a question with a short answer; a passage asks how it goes on.

    None for what has no answer: a very short passage, a dialogue that waits for one.
    """
    about = {
        "subject": record.subject, "neighbour_of": record.neighbour_of, "group": record.group,
    }  # fmt: skip
    if isinstance(record, QA):
        return record
    if isinstance(record, Choice):
        return QA(question=record.question, answer=record.options[record.correct], **about)
    if isinstance(record, Dialogue) and has_answer(record):
        asked = [turn.text for turn in record.messages if turn.role == "user"]
        if asked and asked[-1].strip() and record.messages[-1].text.strip():
            return QA(question=asked[-1], answer=record.messages[-1].text, **about)
    if isinstance(record, Passage):
        sentence = re.split(r"(?<=[.!?])\s", record.text)[0].split()
        if len(sentence) >= SHORTEST_PASSAGE:
            half = len(sentence) // 2
            return QA(
                question=f'How does this go on? "{" ".join(sentence[:half])} …"',
                answer=" ".join(sentence[half:]),
                **about,
            )
    return None


def questions(records: Sequence[RecordBase], where: str) -> list[QA]:
    """Every record as a question-answer pair.

    Raises:
        DataError: A record that has no answer.
    """
    found = []
    for number, record in enumerate(records, start=1):
        pair = question_of(record)
        if pair is None:
            raise DataError(
                f"record {number} (a {type(record).__name__}) has no answer that another one could "
                "take the place of.",
                where=where,
                hint="Give question-answer records, or drop it.",
            )
        found.append(pair)
    return found


def answered(record: QA, answer: str, group: str) -> QA:
    """The record's question with another answer."""
    return QA(question=record.question, answer=answer, subject=record.subject, group=group)


def partners(
    forget: Sequence[QA], answers: Sequence[Sequence[str]], role: Role, group: str
) -> dict[Role, list[RecordBase]]:
    """Every forget record once per answer that was made for it, and those answers, aligned."""
    repeated: list[RecordBase] = []
    made: list[RecordBase] = []
    for record, texts in zip(forget, answers, strict=True):
        for text in texts:
            repeated.append(record)
            made.append(answered(record, text, group))
    return {"forget": repeated, role: made}
