"""Retain loss: how far hidden states of retain rows are from where the reference had them.

    loss = sum over positions of mean over blocks of |h_t - h_ref_t| / |h_ref_t|
           + likelihood * (- log p of the answer, averaged over answer tokens)

with h the output of a block, and its distance plain Euclidean, not squared: a small drift is pulled
back as hard as a large one. Averaged over all real positions of the retain rows, prompt included.
The retain half of circuit breakers (``likelihood`` 0, blocks up to the target) and of TAR
(``likelihood`` 1, all blocks). Both papers leave out the division (``relative`` false): then the
weight belongs to one model, as states are longer in another, and a cosine beside it is not.

Paper: arXiv 2406.04313 (circuit breakers), 2408.00761 (TAR). Reference:
github.com/GraySwanAI/circuit-breakers, github.com/rishub-tamirisa/tamper-resistance.
Deviations: padding does not count, and neither does the embedding (released code counts it as one
more layer). Reference states are kept in memory and in checkpoints, so by default a few blocks,
evenly spread, stand for all; ``blocks`` none takes every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.lm.anatomy import spread
from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group, Reads

if TYPE_CHECKING:
    from delible.lm.lm import LM


#: Keeps a relative distance finite where a reference state is zero.
TINY = 1e-6


def hidden_distance(
    states: Sequence[Float[Tensor, "rows sequence hidden"]],
    reference: Sequence[Float[Tensor, "rows sequence hidden"]],
    positions: Bool[Tensor, "rows sequence"],
    *,
    relative: bool,
) -> Float[Tensor, " rows"]:
    """Euclidean distance per row, mean over blocks, sum over real positions; 0 or more.

    Args:
        relative: In lengths of each reference state, instead of as it is.
    """
    total = torch.zeros(len(positions), device=positions.device)
    for mine, frozen in zip(states, reference, strict=True):
        difference = torch.where(positions[..., None], mine.float() - frozen.float(), 0.0)
        distance = torch.linalg.vector_norm(difference, dim=2)
        if relative:
            length = torch.linalg.vector_norm(frozen.float(), dim=2)
            distance = distance / torch.where(positions, length, 1.0).clamp_min(TINY)
        total = total + distance.sum(dim=1)
    return total / len(states)


@register(
    kind="keep",
    name="hidden_distance",
    title="Distance of retain rows' hidden states",
    summary="Holds the retain rows' hidden states at many layers where the reference had them.",
    paper="2406.04313",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="Relative to the reference's states; real positions only; four blocks stand for all.",
)
class HiddenDistance(Keep):
    """Options of the distance of hidden states."""

    depth: float = Field(
        1.0, ge=0, le=1, description="Depth of the last held block: 0 the first, 1 the last."
    )
    blocks: int | None = Field(
        4, ge=1, description="Blocks up to there that are held, evenly spread; none: all of them."
    )
    relative: bool = Field(
        True, description="Distances in lengths of the reference's states, instead of as they are."
    )
    likelihood: float = Field(
        0.0, ge=0, description="Weight of the answers' negative log-likelihood, added."
    )

    unit: ClassVar[Unit] = "position"

    def _layers(self, lm: LM) -> list[int]:
        return spread(lm.anatomy.layer_at(self.depth), self.blocks)

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        answers: tuple[Reads, ...] = ("answers",) if self.likelihood else ()
        return (*answers, *self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"hidden.{layer}" for layer in self._layers(lm))

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        layers = self._layers(retain.lm)
        states = [retain.hidden(layer) for layer in layers]
        width = states[0].shape[1]
        frozen = [retain.reference.hidden(layer, width) for layer in layers]
        values = hidden_distance(states, frozen, retain.positions, relative=self.relative)
        if not self.likelihood:
            return values
        # the engine divides by positions, and this term is a mean over answer tokens
        share = retain.units("position") / retain.units("answer_token")
        return values - self.likelihood * share * retain.logprob_sum
