"""GUARD: forget rows that share knowledge with the retain rows count less.

    a_i = < gradient of row i, mean gradient of the retain rows >       at the start model
    w_i = n exp(-z_i / T) / sum_k exp(-z_k / T)                         z = standardised a

An ascent step of size eta on row i raises the mean retain loss by eta a_i (to first order), so
rows with a large a_i get a small weight. Weights have mean 1: the total pressure stays, it is
only shared out anew. They are made once and kept; ``refresh_every`` (ours) makes them anew
after so many epochs, at the model as it is then.

Paper: arXiv 2506.10946; no public code. The paper fixes that weights fall with the score, not
their form: the softmax and its temperature are ours (at 2, two standard deviations on each side
differ by a factor of about 7), and so is ``form: inverse`` (1 / (z - min z + offset)).
Scores are central differences of the loss along the mean retain gradient: two forward passes
over the forget rows instead of one backward pass per row (``how: jvp`` is exact instead).
``space`` looks at a part of the gradient, for models whose whole gradient does not fit.

A model that was trained on the retain rows has next to no gradient there, and the scores are
noise: ``paraphrases`` takes the mean gradient at other wordings of the retain questions.

Small weights can leave a row memorised: look at the worst forget rows, not only at the mean. The
sign is that of ascent; for a loss that teaches refusals it says less.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError
from delible.records import QA, RecordBase
from delible.registry import register
from delible.train.gradient_space import Space
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.slots import SlotContext, Weigh

logger = logging.getLogger(__name__)

#: Below this share of effective rows the weights are all but one-hot.
_FEW = 0.3


def weights_from_scores(
    scores: Float[Tensor, " rows"],
    form: Literal["softmax", "inverse"],
    temperature: float,
    offset: float,
) -> Float[Tensor, " rows"]:
    """Weights with mean 1 that fall as the score rises; all 1 when the scores do not differ."""
    scores = scores.double()
    spread = scores.std(correction=0)
    if not float(spread) > 0:
        return torch.ones_like(scores)
    standard = (scores - scores.mean()) / spread
    if form == "softmax":
        return len(scores) * torch.softmax(-standard / temperature, dim=0)
    inverse = 1 / (standard - standard.min() + offset)
    return inverse / inverse.mean()


def effective_rows(weights: Float[Tensor, " rows"]) -> float:
    """(sum w)^2 / sum w^2: the number of rows when all weigh the same, 1 when one does."""
    return float(weights.sum() ** 2 / weights.pow(2).sum())


def reworded(records: Sequence[RecordBase]) -> list[RecordBase]:
    """The records that have another wording, asked in it."""
    return [
        record.model_copy(update={"question": record.paraphrases[0]})
        for record in records
        if isinstance(record, QA) and record.paraphrases
    ]


@register(
    kind="weigh",
    name="attribution",
    title="Data attribution (GUARD)",
    summary="Gives forget rows that align with the retain gradient a smaller weight.",
    paper="2506.10946",
    year=2025,
    family="data weighting",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain", "weights"),
    changes="weights",
    reversible=False,
    weakest="the forget rows with the smallest weights",
    badges=("parity", "variant"),
    variant="The form of the weights is ours: a softmax of standardised scores.",
)
class Attribution(Weigh):
    """Options of data attribution."""

    form: Literal["softmax", "inverse"] = Field("softmax", description="From score to weight.")
    temperature: float = Field(
        2.0, gt=0, description="Of the softmax, in standard deviations; larger: more equal."
    )
    offset: float = Field(
        1.0, gt=0, description="Of the inverse form, in standard deviations; larger: more equal."
    )
    retain_rows: int = Field(
        2000, ge=1, description="At most this many random retain rows make the mean gradient."
    )
    paraphrases: bool = Field(
        False, description="Take the mean gradient at paraphrases of the retain questions."
    )
    how: Literal["difference", "jvp"] = Field(
        "difference", description="Scores by a difference of losses, or exactly in forward mode."
    )
    space: Literal["all", "layers", "head", "lora"] = Field(
        "all", description="Parameters of the scores: all, blocks, the head, low-rank factors."
    )
    layers: tuple[int, ...] = Field(
        (-1,), min_length=1, description="Blocks for space: layers; negative from the end."
    )

    refresh_every: int = Field(
        0, ge=0, description="Epochs after which the rows are weighed anew; 0: only at the start."
    )

    def due(self, epoch: int) -> bool:
        return self.refresh_every > 0 and epoch % self.refresh_every == 0

    def needs_whole(self) -> str | None:
        reason = "with refresh_every it takes gradients of single rows while the model is trained"
        return reason if self.refresh_every else None

    def weights(self, context: SlotContext) -> Float[Tensor, " rows"]:
        forget, retain = context.rows["forget"], self._retain(context)
        order = torch.randperm(len(retain), generator=context.generator("weigh.attribution"))
        chosen = [retain[index] for index in sorted(order[: self.retain_rows].tolist())]
        gradients = context.gradients.within(Space(self.space, self.layers, seed=context.seed))
        mean_gradient = gradients.total(chosen)
        for value in mean_gradient.values():
            value.div_(len(chosen))
        scores = gradients.products(forget, mean_gradient, how=self.how, consume=True)
        weights = weights_from_scores(scores, self.form, self.temperature, self.offset)
        effective = effective_rows(weights)
        logger.info(
            f"weigh: weights from {float(weights.min()):.2f} to {float(weights.max()):.2f}, "
            f"{effective:.1f} effective of {len(forget)} forget rows"
        )
        if effective < _FEW * len(forget):
            logger.warning("weigh: few rows carry most of the weight; raise the temperature.")
        return weights.float()

    def _retain(self, context: SlotContext) -> Sequence[Row]:
        retain = context.rows.get("retain", ())
        if not retain:
            raise RecipeError(
                "data attribution compares forget rows with retain rows, and there are none.",
                where="weigh 'attribution'",
                hint="Give --retain FILE, or use weigh: none.",
            )
        if not self.paraphrases:
            return retain
        other = reworded(context.records["retain"])
        if not other:
            raise RecipeError(
                "no retain record has paraphrases.",
                where="weigh 'attribution'",
                hint="Add 'paraphrases' to the retain records, or set paraphrases: false.",
            )
        return make_rows(context.lm.template, other)
