"""Latents of a sparse autoencoder that speak of a concept: found by statistics, and turned down.

    s_j = m+_j / sum m+  -  m-_j / sum m-            m: mean latent with the concept, and without
    x' = x + sum over fired j of (z'_j - z_j) W_dec[j]      z'_j = factor * z_j  if z_j > t_j

The change is added, so what the autoencoder does not explain stays as it is, and a state in which
no chosen latent fires is the same bit by bit. The same on the residual stream and in a tower for
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.intervene.sae import SAE
from delible.records import RecordBase

#: How latents are ranked: by the share of all that speaks, or by their mean alone.
Score = Literal["selective", "mean"]
#: What a latent is multiplied by: the factor, or the factor times its mean with the concept.
Form = Literal["scale", "mean_scale"]
#: Keeps a share of nothing from being no number.
_TINY = 1e-8


@dataclass(frozen=True)
class Features:
    """Latents that are turned down, each from its threshold on.

    Attributes:
        latents: Which; ascending, each once.
        thresholds: What each must exceed.
        factors: By what it is then multiplied: 1 leaves it, 0 takes it out, below 0 reverses it.
    """

    latents: Int[Tensor, " feature"]
    thresholds: Float[Tensor, " feature"]
    factors: Float[Tensor, " feature"]

    def __or__(self, other: Features) -> Features:
        """Both: what is in both is turned down more, and from the lower threshold on."""
        found: dict[int, tuple[float, float]] = {}
        for one in (self, other):
            rows = zip(one.latents.tolist(), one.thresholds.tolist(), one.factors.tolist(),
                       strict=True)  # fmt: skip
            for latent, threshold, factor in rows:
                known = found.get(latent, (threshold, factor))
                found[latent] = min(known[0], threshold), min(known[1], factor)
        latents = sorted(found)
        values = torch.tensor([found[latent] for latent in latents]).reshape(-1, 2)
        return Features(torch.tensor(latents, dtype=torch.long), values[:, 0], values[:, 1])


@dataclass
class Activity:
    """What latents do on some states: their mean, and how often they speak."""

    sums: Float[Tensor, " latent"]
    spoke: Float[Tensor, " latent"]
    count: int = 0

    @classmethod
    def of(cls, sae: SAE, states: Sequence[Float[Tensor, "token width"]]) -> Activity:
        """Over all tokens of some texts or pictures."""
        zeros = torch.zeros(sae.latents, dtype=torch.float64)
        found = cls(zeros, zeros.clone())
        for one in states:
            for part in one.split(4096):
                latents = sae.encode(part)
                found.sums += latents.double().sum(dim=0)
                found.spoke += (latents > 0).double().sum(dim=0)
                found.count += len(part)
        return found

    @property
    def mean(self) -> Float[Tensor, " latent"]:
        """Mean of each latent."""
        return self.sums / max(self.count, 1)

    @property
    def frequency(self) -> Float[Tensor, " latent"]:
        """Share of the states in which each latent speaks, in [0, 1]."""
        return self.spoke / max(self.count, 1)


def scores(
    with_concept: Float[Tensor, " latent"], without: Float[Tensor, " latent"], how: Score
) -> Float[Tensor, " latent"]:
    """How much each latent speaks of the concept; higher is more."""
    if how == "mean":
        return with_concept
    return with_concept / (with_concept.sum() + _TINY) - without / (without.sum() + _TINY)


def chosen(
    score: Float[Tensor, " latent"], count: int, usable: Bool[Tensor, " latent"]
) -> Int[Tensor, " feature"]:
    """The latents with the highest scores above 0, of those that may be chosen, ascending."""
    score = score.masked_fill(~usable, -torch.inf)
    top = score.topk(min(count, len(score)))
    found: Tensor = top.indices[top.values > 0].sort().values
    return found


def by_subject(records: Sequence[RecordBase]) -> list[list[RecordBase]]:
    """Records of one subject together, in the order in which subjects come."""
    groups: dict[str | None, list[RecordBase]] = {}
    for record in records:
        groups.setdefault(record.subject, []).append(record)
    return list(groups.values())


def features_of(
    with_concept: Activity,
    without: Activity,
    count: int,
    most: float,
    how: Score,
    factor: float,
    form: Form = "scale",
) -> Features:
    """The latents of one concept.

    Args:
        with_concept, without: What latents do on records with it, and on those that are kept.
        count: How many at most.
        most: Share of kept states in which a latent may speak.
        how: How they are ranked.
        factor: By what they are multiplied.
        form: Whether each one's factor is scaled by its mean with the concept.
    """
    score = scores(with_concept.mean, without.mean, how)
    latents = chosen(score, count, without.frequency <= most)
    both = (with_concept.sums + without.sums) / (with_concept.count + without.count)
    thresholds = both[latents].float()
    factors = torch.full_like(thresholds, factor)
    if form == "mean_scale":
        factors = factors * with_concept.mean[latents].float()
    return Features(latents, thresholds, factors)


def turned_down(
    states: Float[Tensor, "token width"], sae: SAE, features: Features
) -> Float[Tensor, "token width"]:
    """The states without (so much of) some latents, in their own data type."""
    if not len(features.latents):
        return states
    latents = sae.encode(states)[:, features.latents]
    fired = latents > features.thresholds.to(latents)
    change = torch.where(fired, latents * (features.factors.to(latents) - 1), 0.0)
    return states + (change @ sae.decoder[features.latents]).to(states.dtype)
