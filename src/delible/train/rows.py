"""From records to tokenized rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from delible.errors import DataError
from delible.lm.template import Encoded, Template
from delible.measure.asking import answer_of, ask
from delible.measure.requests import Prompt
from delible.records import RecordBase
from delible.train.step import RetainKind, Row


def make_row(
    template: Template, prompt: Prompt, answer: str, index: int, record: RecordBase
) -> Row:
    """A row that teaches (or forgets) ``answer`` after ``prompt``."""
    encoded: Encoded = template.encode(prompt, answer)
    if not encoded.answer_tokens:
        raise DataError(
            f"the answer {answer!r} has no tokens.", hint="Give it a text, or drop the record."
        )
    kind: RetainKind = "general"
    if record.neighbour_of is not None:
        kind = "direct"
    elif record.subject is not None:
        kind = "indirect"
    key = hashlib.sha256(repr((encoded.ids, encoded.start)).encode()).hexdigest()[:24]
    return Row(index, encoded, key, record.subject, record.neighbour_of, kind)


def make_rows(template: Template, records: Sequence[RecordBase]) -> list[Row]:
    """One row per record, in order."""
    rows = []
    for index, record in enumerate(records):
        prompt = ask(record)
        if prompt is None:
            raise DataError(f"a {type(record).__name__} cannot be trained on.")
        rows.append(make_row(template, prompt, answer_of(record), index, record))
    return rows


def refusal_rows(
    template: Template,
    records: Sequence[RecordBase],
    refusals: Sequence[str],
    generator: torch.Generator,
) -> list[Row]:
    """The same questions with a refusal as answer, drawn at random."""
    drawn = torch.randint(len(refusals), (len(records),), generator=generator).tolist()
    rows = []
    for index, (record, choice) in enumerate(zip(records, drawn, strict=True)):
        prompt = ask(record)
        if prompt is None or prompt.text is not None:
            raise DataError(
                f"a {type(record).__name__} has no question that could be refused.",
                hint="Choose a method without refusals, or give question-answer records.",
            )
        rows.append(make_row(template, prompt, refusals[choice], index, record))
    return rows
