"""Weight averaging (WA): the result is the mean of the weights over the late steps.

    theta = mean of theta_t over every `every`-th step t from `start` of the way on

The mean of points on the way lies in a flatter region than its last point, if there are some: a
short run takes steps that lie closer together, and begins earlier, until there are `points` of
them. Keeps one copy of the trained weights, which is part of every checkpoint; costs nothing else.

Paper: arXiv 2502.05374 (a smoothness baseline beside SAM), after arXiv 1803.05407. Reference
code: github.com/OPTML-Group/Unlearn-Smooth (from step 100 of 125 on, every 5 steps).
Deviations: the start is a share of the run instead of a step number, and gives way in short runs;
the mean is updated as mean + (theta - mean) / n, which does not multiply by n; weights of a step
that ends the run because it used up the utility budget do not count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from pydantic import Field

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.registry import register
from delible.train.losses import Memory
from delible.train.slots import Finish, FinishContext

logger = logging.getLogger(__name__)


def averaged_steps(total: int, start: float, every: int, points: int) -> range:
    """The steps (from 1) of a run of ``total`` whose weights are averaged.

    Args:
        start: Share of the run after which they begin, in [0, 1).
        every: Steps between two of them; fewer in a short run.
        points: So many there are at least (2 or more), if the run has as many steps.
    """
    first = min(max(1, math.ceil(start * total - 1e-9)), max(1, total - points + 1))
    return range(first, total + 1, min(every, max(1, (total - first) // (points - 1))))


@register(
    kind="finish",
    name="weight_averaging",
    title="Weight averaging (WA)",
    summary="Takes the mean of the weights over the late steps; keeps one copy of them.",
    paper="2502.05374",
    year=2025,
    family="smoothness",
    intention="as host",
    mechanism="wrapper",
    needs=("weights",),
    changes="weights",
    reversible=False,
    weakest="the attack it was not trained for",
    badges=("parity", "variant"),
    variant="The start is a share of the run; short runs average steps that lie closer together.",
)
class WeightAveraging(Finish):
    """Options of weight averaging."""

    start: float = Field(0.8, ge=0, lt=1, description="Share of the steps after which it begins.")
    every: int = Field(
        5, ge=1, description="Steps between two points of the mean; fewer in a short run."
    )
    points: int = Field(
        5, ge=2, description="Points at least: a short run takes closer and earlier steps."
    )

    def steps(self, total: int) -> range:
        """The steps (from 1) of a run of ``total`` whose weights are part of the mean."""
        return averaged_steps(total, self.start, self.every, self.points)

    def check(self, total: int) -> None:
        """Refuses a run that has fewer steps than the mean wants points."""
        if total < self.points:
            raise RecipeError(
                f"a mean over {self.points} steps cannot be taken: the run has {total} "
                f"step{'s' * (total != 1)}.",
                where="finish 'weight_averaging'",
                hint="Train longer (--epochs), in smaller batches (--batch-size), or lower "
                "finish.points.",
            )

    @torch.no_grad()
    def observe(
        self, step: int, total: int, parameters: Sequence[torch.nn.Parameter], memory: Memory
    ) -> None:
        if step not in self.steps(total):
            return
        if "weight_averaging.mean" not in memory:
            memory["weight_averaging.count"] = [torch.zeros((), dtype=torch.int64)]
            memory["weight_averaging.mean"] = [torch.zeros_like(value) for value in parameters]
        count = memory["weight_averaging.count"][0].add_(1)
        for mean, value in zip(memory["weight_averaging.mean"], parameters, strict=True):
            mean.add_((value - mean) / int(count))

    @torch.no_grad()
    def apply(self, context: FinishContext) -> LM:
        if "weight_averaging.mean" not in context.memory:
            logger.warning(
                "finish: nothing was averaged, since the run ended before its late steps; the "
                "model is as trained (a smaller `start` begins earlier)."
            )
            context.notes["weight_averaging"] = {"points": 0}
            return context.lm
        context.lm.settle()
        means = context.memory["weight_averaging.mean"]
        for parameter, mean in zip(context.parameters.values(), means, strict=True):
            parameter.copy_(mean)
        points = int(context.memory["weight_averaging.count"][0])
        context.lm.touch()
        context.notes["weight_averaging"] = {"points": points}
        early = f", since the run ended early; {self.points} were wanted"
        logger.info(
            f"finish: the weights are the mean over {points} step{'s' * (points != 1)}"
            f"{early if points < self.points else ''}"
        )
        return context.lm
