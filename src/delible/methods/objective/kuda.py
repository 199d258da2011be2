"""KUDA: hidden states of forget rows leave the place where the reference model had them.

    d_t  = 1 - cos(h_t, h0_t)                 h: output of a block that moves; h0: the reference's
    loss = mean over blocks and positions of (2 / beta) * log(1 + exp(-beta * d_t))

A deviation instead of a direction: nothing is said about where to go, the pull fades once d is
well above 1 / beta, and for beta towards 0 its gradient is that of -d.

Paper: arXiv 2602.19275. Reference code: none was found; the paper names the parts (cosine
complement, inverse temperature), and the shape of the loss is a reconstruction.
Deviations: where h = h0 a cosine has no gradient, so h0 is shifted by ``kick`` of its length in one
random direction per block, the same for all positions; the first position of a row does not count,
since its state is huge in most models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from delible.registry import register
from delible.train.losses import Objective
from delible.train.randomness import generator
from delible.train.representation import share_without_first, without_first
from delible.train.row import Unit
from delible.train.step import Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM


def shifted(
    states: Float[Tensor, "rows sequence hidden"], kick: float, seed: int, layer: int
) -> Float[Tensor, "rows sequence hidden"]:
    """States moved by a share of their length in one random direction."""
    drawn = torch.randn(states.shape[2], generator=generator(seed, "kuda", layer))
    direction = (drawn / drawn.norm()).to(states)
    return states + kick * torch.linalg.vector_norm(states, dim=2, keepdim=True) * direction


def deviation_loss(
    states: Float[Tensor, "rows sequence hidden"],
    reference: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """(2 / beta) log(1 + exp(-beta (1 - cos))), summed over positions; above 0."""
    # a state of zeros, as padding has, has no direction
    own = torch.where(positions[..., None], states.float(), 1.0)
    frozen = torch.where(positions[..., None], reference.float(), 1.0)
    deviation = 1 - cosine_similarity(own, frozen, dim=2)
    return (softplus(-beta * deviation) * (2 / beta) * positions).sum(dim=1)


@register(
    kind="objective",
    name="kuda",
    title="Deviating representations (KUDA)",
    summary="Turns the forget rows' hidden states away from where the reference had them.",
    paper="2602.19275",
    year=2026,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="not known: the paper has no attacks; relearning undoes other losses of this kind",
    badges=("parity", "variant"),
    variant="The reference is shifted a little, for a gradient at the start; first positions do "
    "not count.",
)
class KUDA(Objective):
    """Options of the deviation loss."""

    beta: float = Field(
        1.0, gt=0, description="Inverse temperature: the pull fades at deviations above 1 / beta."
    )
    kick: float = Field(
        1e-3, ge=0, le=0.1, description="Shift of the reference's states, in their lengths."
    )
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="Indices of the blocks that are read; none: those whose weights move."
    )

    unit: ClassVar[Unit] = "position"

    def settled(self, moving: Sequence[int]) -> Self:
        if self.layers is not None or not moving:
            return self
        return self.model_copy(update={"layers": tuple(moving)})

    def _layers(self, lm: LM) -> list[int]:
        count = lm.anatomy.layers
        if self.layers is None:
            return list(range(count))
        return sorted({layer % count for layer in self.layers if lm.anatomy.block_path(layer)})

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"hidden.{layer}" for layer in self._layers(lm))

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        layers, positions = self._layers(forget.lm), without_first(forget.positions)
        found = []
        for layer in layers:
            states = forget.hidden(layer)
            frozen = forget.reference.hidden(layer, states.shape[1])
            frozen = shifted(frozen, self.kick, 0, layer)
            found.append(deviation_loss(states, frozen, positions, self.beta))
        return torch.stack(found).mean(dim=0) * share_without_first(step, "forget")
