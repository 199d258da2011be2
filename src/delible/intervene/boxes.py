"""A box in the space of keys, and a key that takes the place of those within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.cards import Card
from delible.intervene.base import Intervention
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Where


def inside(
    keys: Float[Tensor, "key width"], mean: Float[Tensor, " width"], half: Float[Tensor, " width"]
) -> Bool[Tensor, " key"]:
    """Which keys lie within half a width of the middle in every dimension."""
    return ((keys - mean).abs() <= half).all(dim=1)


class BoxedKey(Intervention):
    """Puts a key in the place of those that lie in a box, where an answer is predicted.

    Its tensors hold ``key``, ``mean`` and ``half``, each of the MLP's inner width.
    """

    depth: float = Field(1.0, ge=0, le=1, description="Depth of the layer: 0 first, 1 last.")

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="mlp_inner", layers=(self.depth,)),)

    @property
    def positions(self) -> Positions:
        return Positions(kind="answer")

    def change(
        self, states: Float[Tensor, "token width"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token width"]:
        caught = inside(states.float(), tensors["mean"], tensors["half"])
        return torch.where(caught[:, None], tensors["key"].to(states.dtype), states)


#: It is no method of its own, so it is not registered.
BoxedKey.card = Card(
    kind="intervention",
    name="boxed_key",
    title="Key out of a box",
    summary="Puts a stored key in the place of keys that lie in a box.",
)
