"""Answer cycle: each question comes equally often, cycling through its answers.

    row i of a question uses answer i mod k,   i = 0 … B - 1

so that with k = 3 answers and B = 8 rows they come 3, 3 and 2 times per epoch. Rows are told to
belong together by their prompt. Each meets one random retain row, if there are any.

Paper: arXiv 2409.11844. Reference: github.com/Carol-gutianle/MEOW (meow/dataset.py).
Deviations: rows of all questions are shuffled together. The released collator splits each
question's rows in two halves and the loss reads only the first; ``compat`` does so too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from delible.registry import register
from delible.train.randomness import shuffled
from delible.train.row import Row
from delible.train.slots import Sample


def cycled(forget: Sequence[Row], rows_per_question: int) -> list[int]:
    """Indices of rows: each question ``rows_per_question`` times, its answers in turn."""
    questions: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(forget):
        questions.setdefault(row.encoded.ids[: row.encoded.start], []).append(index)
    return [
        mine[turn % len(mine)] for mine in questions.values() for turn in range(rows_per_question)
    ]


@register(
    kind="sample",
    name="answer_cycle",
    title="Answer cycle",
    summary="Each question comes equally often per epoch, cycling through its answers.",
    paper="2409.11844",
    year=2024,
    family="sampling",
    intention="as host",
    mechanism="wrapper",
    needs=("forget",),
    badges=("parity",),
)
class AnswerCycle(Sample):
    """Options of the answer cycle."""

    rows_per_question: int = Field(8, ge=1, description="Rows of each question in an epoch.")
    compat: bool = Field(
        False, description="Use the first half of each question's rows only, as released."
    )

    def epoch(
        self,
        forget: Sequence[Row],
        retain: Sequence[Row],
        epoch: int,
        generator: torch.Generator,
    ) -> list[tuple[int, int | None]]:
        count = self.rows_per_question // 2 if self.compat else self.rows_per_question
        order = shuffled(cycled(forget, max(1, count)), generator)
        if not retain:
            return [(index, None) for index in order]
        drawn: list[int] = []
        while len(drawn) < len(order):
            drawn += shuffled(range(len(retain)), generator)
        return list(zip(order, drawn, strict=False))
