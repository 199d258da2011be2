"""Retain loss: hidden states of retain rows stay where the reference model had them.

    loss = sum over positions of mean over hidden dimensions of (h_t - h_ref_t)^2

with h the output of one block, or (``depth: null``) the mean of this over all blocks whose weights
move; averaged over all real positions of the retain rows, prompt included. The retain half of
representation methods: give it the objective's ``depth``.

Paper: arXiv 2403.03218. Reference: github.com/centerforaisafety/wmdp.
Deviations: padding does not count (the original averages over it); prompts do (open-unlearning's
port looks at answer positions only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import Field, PrivateAttr
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.representation import squared_distance
from delible.train.row import Unit
from delible.train.step import Group, Reads

if TYPE_CHECKING:
    from delible.lm.lm import LM


@register(
    kind="keep",
    name="hidden_mse",
    title="Hidden states of retain rows",
    summary="Holds the retain rows' hidden states at some layers where the reference had them.",
    paper="2403.03218",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="All real positions count, prompts included and padding not.",
)
class HiddenMSE(Keep):
    """Options of the hidden-state loss."""

    depth: float | None = Field(
        7 / 32, ge=0, le=1,
        description="Depth of the held block: 0 the first, 1 the last; none: all that move.",
    )  # fmt: skip
    _moving: tuple[int, ...] = PrivateAttr(())

    unit: ClassVar[Unit] = "position"

    def settled(self, moving: Sequence[int]) -> Self:
        other = self.model_copy()
        other._moving = tuple(moving)
        return other

    def _layers(self, lm: LM) -> Sequence[int]:
        if self.depth is not None:
            return (lm.anatomy.layer_at(self.depth),)
        return self._moving or range(lm.anatomy.layers)

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(self._layers(lm))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"hidden.{layer}" for layer in self._layers(lm))

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        found = []
        for layer in self._layers(retain.lm):
            states = retain.hidden(layer)
            reference = retain.reference.hidden(layer, states.shape[1])
            found.append(squared_distance(states, reference, retain.positions))
        return torch.stack(found).mean(dim=0)
