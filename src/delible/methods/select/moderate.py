"""Moderate coreset: forget rows at a medium distance from their class's centre stand for all.

    z_i = mean over positions of the last hidden states         standardised per channel
    d_i = || z_i - centre of i's class ||,   s_i = -| d_i - median of d in the class |

Neither the typical rows nor the outliers. Classes are found by k-means, or given: the records'
subjects or groups.

Paper: arXiv 2504.10185 (the coreset effect), score from Xia et al., ICLR 2023 ("Moderate
Coreset"). Reference code: github.com/OPTML-Group/MU-Coreset.
Deviation: channels are standardised over the rows first; a few channels of a language model are
so large that raw distances are theirs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.activations import mean_states
from delible.train.coreset import ScoredSelect
from delible.train.slots import SlotContext

#: Rounds of one k-means run, at most.
_ROUNDS = 100


def standardised(features: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
    """Mean 0 and spread 1 per channel, float64; a channel without spread becomes 0."""
    features = features.double()
    centred = features - features.mean(dim=0)
    spread = centred.std(dim=0, correction=0)
    return torch.where(spread > 1e-12, centred / spread.clamp(min=1e-12), 0.0)


def medium_scores(
    distances: Float[Tensor, " rows"], classes: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """-|distance - median distance of the row's class|; 0 is highest."""
    scores = torch.zeros_like(distances)
    for one in classes.unique():
        mine = classes == one
        scores[mine] = -(distances[mine] - float(np.median(distances[mine].numpy()))).abs()
    return scores


def distances_to_centres(
    features: Float[Tensor, "rows hidden"], classes: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Euclidean distance of each row to the mean of its class."""
    distances = features.new_zeros(len(features))
    for one in classes.unique():
        mine = features[classes == one]
        distances[classes == one] = (mine - mine.mean(dim=0)).norm(dim=1)
    return distances


def k_means(
    features: Float[Tensor, "rows hidden"], clusters: int, starts: int, random: torch.Generator
) -> Int[Tensor, " rows"]:
    """The class of each row, from the best of several starts (k-means++)."""
    clusters = min(clusters, len(features))
    best, lowest = torch.zeros(len(features), dtype=torch.long), float("inf")
    for _ in range(starts):
        centres = _first_centres(features, clusters, random)
        classes = torch.full((len(features),), -1)
        for _ in range(_ROUNDS):
            nearest = torch.cdist(features, centres).argmin(dim=1)
            if torch.equal(nearest, classes):
                break
            classes = nearest
            for one in range(clusters):
                if bool((classes == one).any()):  # an empty class keeps its centre
                    centres[one] = features[classes == one].mean(dim=0)
        spread = float(distances_to_centres(features, classes).pow(2).sum())
        if spread < lowest:
            best, lowest = classes, spread
    return best


def _first_centres(features: Tensor, clusters: int, random: torch.Generator) -> Tensor:
    """Rows drawn one after the other, far ones more likely."""
    chosen = [int(torch.randint(len(features), (1,), generator=random))]
    while len(chosen) < clusters:
        squares = torch.cdist(features, features[chosen]).min(dim=1).values.pow(2)
        if float(squares.sum()) == 0.0:  # fewer different rows than classes
            break
        chosen.append(int(torch.multinomial(squares, 1, generator=random)))
    return features[chosen].clone()


def given_classes(names: Sequence[str | None]) -> Int[Tensor, " rows"]:
    """Numbers for names; rows without a name are one class."""
    known = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names])


@register(
    kind="select",
    name="moderate",
    title="Moderate coreset",
    summary="Uses the share of the forget rows at a medium distance from their class's centre.",
    paper="2504.10185",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="nothing",
    weakest="the forget rows that were not chosen",
    badges=("parity", "variant"),
    variant="Channels of the hidden states are standardised before distances are taken.",
)
class Moderate(ScoredSelect):
    """Options of the moderate coreset."""

    classes: Literal["k_means", "subject", "group"] = Field(
        "k_means", description="What a row is compared within: found, or named in the records."
    )
    clusters: int = Field(4, ge=1, description="Classes that k-means looks for.")
    starts: int = Field(10, ge=1, description="Starts of k-means; the best one counts.")

    def scores(self, context: SlotContext) -> Float[Tensor, " rows"]:
        features = standardised(mean_states(context.lm, context.rows["forget"], context.stage))
        if self.classes == "k_means":
            random = context.generator("select.moderate")
            classes = k_means(features, self.clusters, self.starts, random)
        else:
            records = context.records["forget"]
            classes = given_classes([getattr(record, self.classes) for record in records])
        return medium_scores(distances_to_centres(features, classes), classes)
