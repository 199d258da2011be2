"""Texts whose states an intervention learns from: a request's records, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from delible.errors import DataError
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import ForgetRequest, RecordBase
from delible.system.asks import Prompt
from delible.system.questions import answer_of, ask, has_answer


def rows_of(lm: LM, request: ForgetRequest, role: Literal["forget", "retain"]) -> list[Encoded]:
    """The records of a role as texts: questions with their answers, passages as they are.

    Raises:
        DataError: There are none.
    """
    rows = encoded(lm, request.forget if role == "forget" else request.retain)
    if not rows:
        raise DataError(
            f"there are no {role} records whose states would be read.",
            hint=f"Give {role} records (--{role} FILE).",
        )
    return rows


def encoded(lm: LM, records: Sequence[RecordBase]) -> list[Encoded]:
    """Records as texts; those that are too long are cut."""
    rows = []
    for record in records:
        prompt = ask(record)
        if prompt is not None:
            answer = answer_of(record) if has_answer(record) else ""
            rows.append(lm.template.encode(prompt, answer))
    return rows


def questions(lm: LM, texts: Sequence[str]) -> list[Encoded]:
    """Questions as prompts with empty answers; those that fit."""
    rows = [lm.template.encode(Prompt.ask(text), "") for text in texts]
    return [row for row in rows if not row.cut]


def behind_shared(rows: Sequence[Encoded]) -> int:
    """How many tokens all texts begin with, at least 1: the first is an outlier in every model."""
    shortest = min(len(row.ids) for row in rows)
    first = rows[0].ids
    same = takewhile(lambda place: all(row.ids[place] == first[place] for row in rows),
                     range(shortest - 1))  # fmt: skip
    return max(1, sum(1 for _ in same))
