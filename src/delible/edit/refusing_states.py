"""Where an edit to a refusal moves what is written, and at which layer it is farthest from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from delible.edit.kept_and_forgotten import Material
from delible.edit.keys import last_states
from delible.errors import RecipeError
from delible.lm.lm import LM


def moved_to_state(
    outputs: Float[Tensor, "forget hidden"], references: Float[Tensor, "references hidden"]
) -> Float[Tensor, "hidden forget"]:
    """What to add so that the block's output is the mean of the refusing states."""
    return (references.mean(dim=0) - outputs).T


def moved_to_value(
    values: Float[Tensor, "hidden forget"],
    references: Float[Tensor, "hidden references"],
    directions: int,
) -> Float[Tensor, "hidden forget"]:
    """What to add so that the matrix writes the mean refusing value.

    Args:
        values: M K_f.
        references: M K_ref.
        directions: q: in so many leading directions of the refusing values the own one stays.
    """
    centre = references.mean(dim=1, keepdim=True)
    basis = torch.linalg.svd(references - centre, full_matrices=False).U[:, :directions]
    return centre + basis @ (basis.T @ (values - centre)) - values


@torch.no_grad()
def farthest_layer(lm: LM, material: Material) -> int:
    """Where the mean keys of forgotten and of refused questions differ most in direction.

    Raises:
        RecipeError: No layer has a single down-projection.
    """
    layers = [
        layer
        for layer in range(lm.anatomy.layers)
        if len(lm.anatomy.mlp_out_parameters(layer)) == 1
    ]
    if not layers:
        raise RecipeError("no layer has a single down-projection.", where=lm.anatomy.class_name)
    forgotten = last_states(lm, material.forget, layers)[0]
    refused = last_states(lm, material.references, layers)[0]
    distances = {
        layer: 1
        - float(
            torch.cosine_similarity(forgotten[layer].mean(dim=0), refused[layer].mean(dim=0), dim=0)
        )
        for layer in layers
    }
    return max(distances, key=distances.__getitem__)


__all__ = ["farthest_layer", "moved_to_state", "moved_to_value"]
