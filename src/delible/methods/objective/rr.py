"""Representation rerouting (RR, circuit breakers): forget rows' hidden states turn away.

    loss = sum over positions of mean over target blocks of max(0, cos(h_t, h_ref_t))

with h the output of a block and h_ref that of the reference; averaged over all real positions of
the forget rows, prompt included. At most 1, and 0 once the states are orthogonal to what they
were; nothing says where they go.

At the start h = h_ref, where a cosine has no gradient at all: rounding and an optimiser that
rescales would decide where the states turn, and in exact arithmetic they never would. So h_ref is
turned by a small angle, towards a fixed random direction per block (``nudge``, a share of its
length); the loss at the start is 1 / sqrt(1 + nudge^2) up to the angle between both, 1 to four
digits.

Paper: arXiv 2406.04313. Reference code: github.com/GraySwanAI/circuit-breakers.
Deviations: the nudge, which 0 turns off; padding does not count, as in the released code. Rows are
the forget records as they are: no blanked user turns, no mix of refusals in the retain set.
Target blocks are depths; 10 / 31 and 20 / 31 are blocks 10 and 20 of a 32-block model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.randomness import generator
from delible.train.row import Unit
from delible.train.step import Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM

Depth = Annotated[float, Field(ge=0, le=1)]


def nudged(
    reference: Float[Tensor, "rows sequence hidden"], share: float, seed: int, layer: int
) -> Float[Tensor, "rows sequence hidden"]:
    """States moved by ``share`` of their length along the block's random direction."""
    size = reference.shape[2]
    draw = torch.randn(size, generator=generator(seed, "rr", layer, size)).to(reference.device)
    lengths = torch.linalg.vector_norm(reference, dim=2, keepdim=True)
    return reference + share * lengths * draw / torch.linalg.vector_norm(draw)


def rerouting(
    states: Sequence[Float[Tensor, "rows sequence hidden"]],
    reference: Sequence[Float[Tensor, "rows sequence hidden"]],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """Positive part of the cosine, mean over blocks, sum over real positions; 0 or more."""
    total = torch.zeros(len(positions), device=positions.device)
    for mine, frozen in zip(states, reference, strict=True):
        cosine = torch.cosine_similarity(mine.float(), frozen.float(), dim=2)
        total = total + torch.where(positions, cosine.relu(), 0.0).sum(dim=1)
    return total / len(states)


@register(
    kind="objective",
    name="rr",
    title="Representation rerouting (circuit breakers)",
    summary="Turns the forget rows' hidden states at some layers away from where they were.",
    paper="2406.04313",
    year=2024,
    family="representation",
    intention="suppression",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; layers below the first target still hold the facts",
    badges=("parity", "variant"),
    variant="A small fixed turn of the reference gives the first step a gradient.",
)
class RR(Objective):
    """Options of representation rerouting."""

    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
        (10 / 31, 20 / 31), description="Depths of the target blocks: 0 the first, 1 the last."
    )
    nudge: float = Field(
        0.01, ge=0, lt=1, description="Turn of the reference, a share of its length; 0: none."
    )
    nudge_seed: int = Field(0, ge=0, description="Seed of the direction of that turn.")

    unit: ClassVar[Unit] = "position"

    def _layers(self, lm: LM) -> list[int]:
        return sorted({lm.anatomy.layer_at(depth) for depth in self.depths})

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"hidden.{layer}" for layer in self._layers(lm))

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        layers = self._layers(forget.lm)
        states = [forget.hidden(layer) for layer in layers]
        width = states[0].shape[1]
        frozen = [
            nudged(forget.reference.hidden(layer, width), self.nudge, self.nudge_seed, layer)
            for layer in layers
        ]
        return rerouting(states, frozen, forget.positions)
