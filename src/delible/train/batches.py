"""Rows through a model as it is, outside a training step: batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from delible.lm.body import shared_prefix
from delible.lm.lm import LM
from delible.train.row import Row

#: Padded tokens per forward pass, shared prefix apart.
FORWARD_BUDGET = 512


def batches(lm: LM, rows: Sequence[Row], budget: int) -> Iterator[list[int]]:
    """Places of rows of like length, ``budget`` padded tokens at once, or a single longer row.

    A prefix that all rows share is computed once, so it costs nothing.
    """
    prompts = [row.encoded.ids[: row.encoded.start] for row in rows]
    shared = shared_prefix(prompts) if lm.shares_prefix else 0
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].encoded.ids)):
        own = len(rows[place].encoded.ids) - shared
        if batch and own * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
