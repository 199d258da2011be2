"""Random mapping: each forget token's hidden states align with a random vector of that token.

    loss = sum over positions of mean over blocks of (1 - |cos(h_t, r(x_t))|)

with h the output of a block and r a fixed random vector per token id; averaged over all real
positions of the forget rows, prompt included. 1 at worst and 0 once aligned. A state then tells
which token stands there, and nothing of what stood before it. The safeguard that TAR starts from.

Paper: arXiv 2408.00761. Reference code: github.com/rishub-tamirisa/tamper-resistance.
Deviations: padding does not count, and neither does the embedding (released code counts it as one
more layer); by default a few blocks, evenly spread, stand for all (``blocks`` none: every one).
Vectors are normal, drawn per token id from the option ``seed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.lm.anatomy import spread
from delible.registry import register
from delible.train.losses import Objective
from delible.train.randomness import generator
from delible.train.row import Unit
from delible.train.step import Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM


@lru_cache(maxsize=1 << 16)
def token_vector(seed: int, token: int, size: int) -> Float[Tensor, " hidden"]:
    """The random vector of a token id; its length means nothing."""
    return torch.randn(size, generator=generator(seed, "random_mapping", token, size))


def vectors_of(
    ids: Int[Tensor, "rows sequence"], seed: int, size: int
) -> Float[Tensor, "rows sequence hidden"]:
    """The vectors of token ids."""
    tokens, places = ids.unique(return_inverse=True)
    table = torch.stack([token_vector(seed, token, size) for token in tokens.tolist()])
    return table.to(ids.device)[places]


def misaligned(
    states: Sequence[Float[Tensor, "rows sequence hidden"]],
    vectors: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """1 - |cos|, mean over blocks, sum over real positions; from 0 to the number of positions."""
    total = torch.zeros(len(positions), device=positions.device)
    for block in states:
        cosine = torch.cosine_similarity(block.float(), vectors, dim=2)
        total = total + torch.where(positions, 1 - cosine.abs(), 0.0).sum(dim=1)
    return total / len(states)


@register(
    kind="objective",
    name="random_mapping",
    title="Random mapping",
    summary="Aligns the forget rows' hidden states with a random vector of each token.",
    paper="2408.00761",
    year=2024,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning: a few steps bring the knowledge back",
    badges=("parity", "variant"),
    variant="Real positions only; by default four blocks stand for all.",
)
class RandomMapping(Objective):
    """Options of random mapping."""

    depth: float = Field(
        1.0, ge=0, le=1, description="Depth of the last mapped block: 0 the first, 1 the last."
    )
    blocks: int | None = Field(
        4, ge=1, description="Blocks up to there that are mapped, evenly spread; none: all of them."
    )
    seed: int = Field(0, ge=0, description="Seed of the random vectors.")

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(spread(lm.anatomy.layer_at(self.depth), self.blocks))

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        layers = spread(forget.lm.anatomy.layer_at(self.depth), self.blocks)
        states = [forget.hidden(layer) for layer in layers]
        vectors = vectors_of(forget.batch.ids, self.seed, states[0].shape[2])
        return misaligned(states, vectors, forget.positions)
