"""What turning latents of an autoencoder down shares, whatever the states: options, and the act.

z'_j = factor * z_j   if j in F and z_j > t_j;   else z'_j = z_j
x' = x + (z' - z) W_dec
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import DataError
from delible.intervene.base import Intervention
from delible.intervene.sae import SAE
from delible.intervene.sae_features import Activity, Features, Form, Score, features_of, turned_down
from delible.ranges import Range


class LatentSteering(Intervention):
    """Options of what turns latents down."""

    sae: Path | None = Field(
        None, description="Folder of a sparse autoencoder of that block, as SAE Lens writes it; "
        "none: one is trained, once per model.",
    )  # fmt: skip
    features: int = Field(32, ge=1, description="Latents of a subject that are turned down.")
    factor: float = Field(
        -1.0, le=1, description="What they are multiplied by when they fire: 0 takes them out, "
        "below 0 reverses them.",
    )  # fmt: skip
    score: Score = Field(
        "selective", description="Rank latents by their share with the concept less that without, "
        "or by their mean with it alone.",
    )  # fmt: skip
    most_frequent: float = Field(
        0.1, gt=0, le=1, description="Share of kept tokens on which a chosen latent may speak."
    )
    expansion: int = Field(8, ge=1, description="Latents per dimension of a trained autoencoder.")
    active: int = Field(32, ge=1, description="Its latents that may speak at once.")
    tokens: int = Field(200_000, ge=1000, description="Tokens that it is trained on at most.")
    passes: int = Field(4, ge=1, description="How often it sees each.")

    def ranges(self) -> dict[str, Range]:
        """How far latents are turned down, and how rare they must be elsewhere."""
        return {
            "factor": Range(low=-2.0, high=0.5),
            "most_frequent": Range(low=0.01, high=0.5, log=True),
        }

    def found(
        self,
        sae: SAE,
        concepts: Sequence[Sequence[Float[Tensor, "token width"]]],
        kept: Sequence[Float[Tensor, "token width"]],
        form: Form = "scale",
    ) -> dict[str, Tensor]:
        """The autoencoder, and the latents of all concepts.

        Args:
            concepts: For each concept, states of what shows it.
            kept: States of what does not.
            form: See :func:`~delible.intervene.sae_features.features_of`.

        Raises:
            DataError: No latent speaks of any of them.
        """
        without = Activity.of(sae, kept)
        each = [
            features_of(
                Activity.of(sae, states), without, self.features, self.most_frequent, self.score,
                self.factor, form,
            )
            for states in concepts
        ]  # fmt: skip
        found = reduce(or_, each)
        if not len(found.latents):
            raise DataError(
                "no latent speaks more of what is forgotten than of what is kept.",
                hint="Give more records, a larger autoencoder (expansion), or another depth.",
            )
        return {
            **{f"sae.{name}": value for name, value in sae.tensors().items()},
            "latents": found.latents,
            "thresholds": found.thresholds,
            "factors": found.factors,
        }


def steered(
    states: Float[Tensor, "token width"], tensors: Mapping[str, Tensor]
) -> Float[Tensor, "token width"]:
    """States as :meth:`LatentSteering.found` would have them."""
    own = {
        name.removeprefix("sae."): value
        for name, value in tensors.items()
        if name.startswith("sae.")
    }
    features = Features(tensors["latents"], tensors["thresholds"], tensors["factors"])
    return turned_down(states, SAE.of(own), features)


def unless(
    spared: torch.Tensor, states: Float[Tensor, "token width"], new: Float[Tensor, "token width"]
) -> Float[Tensor, "token width"]:
    """The new states, but where a token is spared the old ones."""
    return torch.where(spared[:, None], states, new)
