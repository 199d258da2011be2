"""A row that is being continued: which token comes next, and when its answer ends.

Drawing is done per row with numbers that depend on its seed alone, so that a batch's make-up
cannot change an answer; answers are cut before a stop text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.body import Body
from delible.system.asks import Decoding

#: Next tokens, one per row of the batch: (logits [rows, vocab], the rows) -> tokens.
Choose = Callable[[Tensor, Sequence["Row"]], list[int]]


Finish = Literal["stop", "length", "broken"]


@dataclass(eq=False)
class Row:
    """A row that is being continued.

    Attributes:
        decoding: How; rows of one batch may differ.
        seed: What its random numbers depend on (unused when greedy).
        said: The tokens so far, without the one that ends the answer.
        finish: Why it ended: an end token or a stop text, its length, or logits that are no
            numbers; None while it goes on.
        prompt: The tokens that it continues, once it has begun.
        adapter: Which of the model's adapters speaks; see :class:`Prompt`.
        doubt: What a router noted of its next token (:meth:`Body.spoken`).
    """

    decoding: Decoding
    seed: str = ""
    said: list[int] = field(default_factory=list)
    finish: Finish | None = None
    prompt: Sequence[int] = ()
    adapter: str | None = None
    doubt: float | None = None

    @cached_property
    def draw(self) -> random.Random:
        """Its random numbers."""
        return random.Random(self.seed)


def heard(lm: Body, row: Row, token: int) -> Finish | None:
    """Takes a row's next token; why the row has ended, if it has."""
    if token in lm.ends:
        return "stop"
    row.said.append(token)
    if _stops(lm, row.said, row.decoding.stop):
        return "stop"
    return "length" if len(row.said) >= room(lm, row.prompt, row.decoding) else None


def room(lm: Body, prompt: Sequence[int], decoding: Decoding) -> int:
    """Tokens that an answer may have: as many as are wanted, or as the context still takes."""
    return min(decoding.max_new_tokens, lm.context - len(prompt))


def choose_tokens(logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> list[int]:
    """The next token of each row, as its decoding says."""
    tokens = [int(token) for token in logits.argmax(dim=1)]
    drawing = [place for place, row in enumerate(rows) if row.decoding.temperature > 0]
    if drawing:
        chosen = [rows[place] for place in drawing]
        for place, token in zip(drawing, _drawn(logits[drawing], chosen), strict=True):
            tokens[place] = token
    return tokens


def _drawn(logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> list[int]:
    logits = logits.double()
    temperature = logits.new_tensor([row.decoding.temperature for row in rows])[:, None]
    top_p = logits.new_tensor([row.decoding.top_p for row in rows])[:, None]
    shares = (logits / temperature).softmax(dim=1)
    ordered, tokens = shares.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    sums = ordered.cumsum(dim=1)
    wanted = sums.new_tensor([row.draw.random() for row in rows])[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
    return [int(token) for token in tokens.gather(1, places)[:, 0]]


def _stops(lm: Body, ids: Sequence[int], stop: Sequence[str]) -> bool:
    if not stop:
        return False
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    return any(one in text for one in stop)


def said_by(
    lm: Body, ids: Sequence[int], stop: Sequence[str] = (), *, stripped: bool = True
) -> str:
    """The text of an answer's tokens, cut before a stop text, without white space around it."""
    text = str(lm.tokenizer.decode(ids, skip_special_tokens=True))
    for one in stop:
        text = text.partition(one)[0]
    return text.strip() if stripped else text
