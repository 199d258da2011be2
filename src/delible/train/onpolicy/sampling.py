"""Completions of one step: all groups in one batch, each question read once for its group.

Tokens are drawn with numbers that depend on the seed, the step, the question and the number of the
completion alone; never on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import RunError
from delible.lm.body import Body
from delible.lm.decode import speak
from delible.lm.speaker import Row, choose_tokens, said_by
from delible.system.asks import Decoding


@dataclass(frozen=True)
class Said:
    """One completion.

    Attributes:
        tokens: All that were drawn, the one that ended it included; at least one.
        finished: It ended by itself.
        text: Without special tokens.
    """

    tokens: tuple[int, ...]
    finished: bool
    text: str


class Choosing:
    """Draws tokens and remembers them, the last one too."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[int]] = {}

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> list[int]:
        plain = all(row.decoding.temperature > 0 and row.decoding.top_p >= 1 for row in rows)
        tokens = drawn(logits, rows) if plain else choose_tokens(logits, rows)
        for token, row in zip(tokens, rows, strict=True):
            if row.finish is None:
                self.drawn.setdefault(id(row), []).append(token)
        return tokens


def drawn(logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> list[int]:
    """Next tokens by inversion of the cumulated shares, without sorting the vocabulary."""
    temperatures = [row.decoding.temperature for row in rows]
    scaled = logits.double() / logits.new_tensor(temperatures, dtype=torch.float64)[:, None]
    sums = scaled.softmax(dim=1).cumsum(dim=1)
    wanted = sums.new_tensor([row.draw.random() for row in rows])[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
    return [int(token) for token in places[:, 0]]


@torch.inference_mode()
def complete(
    lm: Body, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[str]
) -> list[Said]:
    """What a model says to prompts of token ids, in order.

    Args:
        prompts: The same one several times for a group; equal ones should have different seeds.
        decoding: Of all of them.
        seeds: What a completion's random numbers depend on.

    Raises:
        RunError: The model gives values that are no numbers.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))[::-1]
    lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
    found: dict[int, Said] = {}
    with lm.evaluating(), lm.computing():
        for places in lm.batches(order, lengths, lm.budget.cached_tokens, lm.budget.rows):
            rows = [Row(decoding, seeds[place]) for place in places]
            choosing = Choosing()
            speak(lm, rows, [prompts[place] for place in places], choosing)
            for place, row in zip(places, rows, strict=True):
                if row.finish == "broken":
                    raise RunError(
                        "the model gives values that are not finite numbers.",
                        where="on-policy training",
                        hint="Lower --learning-rate; the last checkpoint is good.",
                    )
                tokens = tuple(choosing.drawn[id(row)])
                found[place] = Said(tokens, row.finish == "stop", said_by(lm, row.said))
    return [found[place] for place in range(len(prompts))]


__all__ = ["Said", "complete"]
