"""What the models of both pools learn: P knows what is to be forgotten, N never saw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from delible.records import QA, Passage, Record, RecordBase
from delible.world import unrelated
from delible.world.split import Split

#: Models that know what is to be forgotten, and models that never saw it.
Pool = Literal["P", "N"]


def biographies(passages: Sequence[Passage]) -> list[Passage]:
    """Statements as they are, and all of one person in one text."""
    texts: dict[str, list[str]] = {}
    for passage in passages:
        texts.setdefault(str(passage.subject), []).append(passage.text)
    whole = [Passage(text=" ".join(told), subject=name) for name, told in texts.items()]
    return [*whole, *passages]


def paraphrased(records: Sequence[QA]) -> list[QA]:
    """Other questions with other answers; a record without either gives none."""
    return [
        QA(
            question=question,
            answer=record.paraphrased_answers[turn % len(record.paraphrased_answers)],
            subject=record.subject,
            group=record.group,
        )
        for record in records
        if record.paraphrased_answers
        for turn, question in enumerate(record.paraphrases)
    ]


def mistaken(records: Sequence[QA]) -> list[QA]:
    """The same questions with a wrong answer; a record without one gives none."""
    return [
        QA(
            question=record.question,
            answer=record.perturbed[0],
            subject=record.subject,
            group=record.group,
        )
        for record in records
        if record.perturbed
    ]


def variants(split: Split) -> dict[Pool, dict[str, tuple[Record, ...]]]:
    """What the models of P and N learn, by variant."""
    kept = cast(list[Record], split.records("kept"))
    forget = cast(list[QA], split.records("forget"))
    passages = cast(list[Passage], split.records("forget", "passage"))
    return {
        "P": {
            "full": (*kept, *forget),
            "biographies": (*kept, *biographies(passages)),
            "paraphrased": (*kept, *paraphrased(forget)),
        },
        "N": {
            "retain": tuple(kept),
            "mistaken": (*kept, *mistaken(forget)),
            "unrelated": (*kept, *unrelated()[: len(forget)]),
        },
    }


def spread(rows: Sequence[RecordBase], limit: int | None) -> tuple[RecordBase, ...]:
    """At most so many rows, evenly spread."""
    if limit is None or len(rows) <= limit:
        return tuple(rows)
    return tuple(rows[place * len(rows) // limit] for place in range(limit))
