"""Coreset at random: a small random share of the forget rows stands for all of them.

Of n forget rows max(1, round(share * n)) are drawn without replacement, from the run's seed.
The number of updates must not shrink with the rows: multiply ``training.epochs`` by 1 / share
(the run says the factor). On topics and books a twentieth does about what all rows do; facts that
are independent of each other (one author each) are not forgotten unless they are drawn, so
measure the rows that were left out on their own.

Paper: arXiv 2504.10185. Deviations: none; the paper's scored selections gain little over chance.
"""

from __future__ import annotations

import logging

import torch
from pydantic import Field

from delible.registry import register
from delible.train.slots import Select, SlotContext

logger = logging.getLogger(__name__)


@register(
    kind="select",
    name="random_coreset",
    title="Random coreset",
    summary="Uses a small random share of the forget rows; train for more epochs in turn.",
    paper="2504.10185",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget",),
    changes="nothing",
    weakest="the forget rows that were not drawn",
)
class RandomCoreset(Select):
    """Options of the random coreset."""

    share: float = Field(0.05, gt=0, le=1, description="Share of the forget rows; 1 takes all.")

    def choose(self, context: SlotContext) -> list[int]:
        available = len(context.rows["forget"])
        count = min(available, max(1, round(self.share * available)))
        order = torch.randperm(available, generator=context.generator("select.random_coreset"))
        logger.info(
            f"select: {count} of {available} forget rows; equal updates take "
            f"{available / count:.3g} times the epochs"
        )
        return sorted(order[:count].tolist())
