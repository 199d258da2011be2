"""GraNd coreset: the forget rows whose gradient is largest stand for all of them.

    s_i = mean over t of || gradient of l(x_i; theta_t) ||        highest first

l is the host's own forget loss (or the answer loss), averaged over the row's units. Where the unit
is the token, long rows have no larger score for being long. Where it is the row they have: NPO, DPO
and KTO sum over the answer, so at the start NPO's score is the answer loss's times the answer's
tokens, and long answers are chosen (``loss: answer`` divides by them). theta_t are ``points``
models along a short run on all forget rows, the start model first. One backward pass per row and
point.

Paper: arXiv 2504.10185 (the coreset effect), score from arXiv 2107.07075. Reference code:
github.com/OPTML-Group/MU-Coreset.
Deviations: (1) the default looks at the start model only, as common reimplementations do; the
expectation over the run is ``points`` above 1; (2) the host's forget term alone is scored: with a
retain term the score would depend on which retain row a forget row happens to meet; (3) ``space``
restricts the norm for models whose gradient does not fit (the paper takes all that is trained).

The paper finds little gain over rows drawn at random. Large gradients also mark typing errors and
foreign languages.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.coreset import ScoredSelect
from delible.train.gradient_space import Space
from delible.train.row_losses import ObjectiveLoss
from delible.train.slots import SlotContext


@register(
    kind="select",
    name="grand",
    title="Coreset by gradient norm (GraNd)",
    summary="Uses the share of the forget rows with the largest gradients.",
    paper="2504.10185",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="nothing",
    weakest="the forget rows that were not chosen",
    badges=("parity", "variant"),
    variant="Scores the forget term alone, by default at the start model only; hosts that sum over "
    "an answer choose long ones.",
)
class GraNd(ScoredSelect):
    """Options of the coreset by gradient norm."""

    loss: Literal["host", "answer"] = Field(
        "host",
        description="The host's forget loss, or the negative log-likelihood per token, which does "
        "not grow with the answer's length.",
    )
    points: int = Field(1, ge=1, description="Models along a short run that are averaged over.")
    point_epochs: int = Field(1, ge=1, description="Passes over the forget rows between two.")
    point_learning_rate: float = Field(1e-5, gt=0, description="Of AdamW in this short run.")
    space: Literal["all", "layers", "head", "lora"] = Field(
        "all", description="Parameters of the norm: all, blocks, the head, low-rank factors."
    )
    layers: tuple[int, ...] = Field(
        (-1,), min_length=1, description="Blocks for space: layers; negative from the end."
    )

    def scores(self, context: SlotContext) -> Float[Tensor, " rows"]:
        rows = context.rows["forget"]
        gradients = context.gradients
        if self.loss == "host":
            gradients = gradients.of(
                ObjectiveLoss.at_start(context.objective, context.rows, context.lm)
            )
        looked_at = gradients.within(Space(self.space, self.layers, seed=context.seed))
        total = looked_at.norms(rows)
        if self.points == 1:
            return total
        with gradients.borrowed():
            for point in range(1, self.points):
                for epoch in range(self.point_epochs):
                    random = context.generator(f"select.grand/{point}/{epoch}")
                    gradients.descend(rows, self.point_learning_rate, random)
                total += looked_at.norms(rows)
        return torch.as_tensor(total / self.points)
