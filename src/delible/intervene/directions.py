"""Directions in the residual stream: how they are found, and how they are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.cards import Card
from delible.intervene.base import Intervention
from delible.intervene.sites import Site
from delible.intervene.taps import Where


def without_direction(
    states: Float[Tensor, "token hidden"], direction: Float[Tensor, " hidden"]
) -> Float[Tensor, "token hidden"]:
    """The part of states that is orthogonal to a direction; without length it changes nothing."""
    length = direction.double().norm()
    if not bool(length > 0):
        return states
    unit = (direction.double() / length).to(states.dtype)
    return states - (states @ unit)[:, None] * unit


def difference_of_means(
    forget: Float[Tensor, "forget hidden"], retain: Float[Tensor, "retain hidden"]
) -> Float[Tensor, " hidden"]:
    """From the mean state of what is kept to the mean state of what is forgotten, float64."""
    return forget.double().mean(dim=0) - retain.double().mean(dim=0)


def principal_component(states: Float[Tensor, "token hidden"]) -> Float[Tensor, " hidden"]:
    """The direction in which states spread most, float64; its largest entry is positive."""
    centred = states.double() - states.double().mean(dim=0)
    vector = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return vector * vector[vector.abs().argmax()].sign()


class LayerDirections(Intervention):
    """Takes a direction of its own out of what each block writes; what attacks put on a copy.

    Its tensors hold ``directions``, shape [layer, hidden].
    """

    layers: tuple[int, ...] = Field((), description="Indices of the layers; empty: all.")

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="block", layers=self.layers),)

    def change(
        self, states: Float[Tensor, "token hidden"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token hidden"]:
        return without_direction(states, tensors["directions"][where.layer or 0])


#: It is no method of its own, so it is not registered.
LayerDirections.card = Card(
    kind="intervention",
    name="layer_directions",
    title="Directions by layer",
    summary="Projects a direction of each layer out of the output of its block.",
)
