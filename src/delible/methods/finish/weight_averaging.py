"""Weight averaging (WA): the result is the mean of the weights over the late steps.

    theta = mean of theta_t over every `every`-th step t from `start` of the way on

The mean of points on the way lies in a flatter region than its last point. Keeps one copy of the
trained weights, which is part of every checkpoint; costs nothing else.

Paper: arXiv 2502.05374 (a smoothness baseline beside SAM), after arXiv 1803.05407. Reference
code: github.com/OPTML-Group/Unlearn-Smooth (from step 100 of 125 on, every 5 steps).
Deviations: the start is a share of the run instead of a step number; the mean is updated as
mean + (theta - mean) / n, which does not multiply by n; weights of a step that ends the run
because it used up the utility budget do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field

from delible.lm.lm import LM
from delible.registry import register
from delible.train.losses import Memory
from delible.train.slots import Finish, FinishContext


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
    variant="The start is a share of the run.",
)
class WeightAveraging(Finish):
    """Options of weight averaging."""

    start: float = Field(0.8, ge=0, lt=1, description="Share of the steps after which it begins.")
    every: int = Field(5, ge=1, description="Steps between two points of the mean.")

    def counts(self, step: int, total: int) -> bool:
        """Whether the weights after ``step`` (from 1) of ``total`` are part of the mean."""
        late = step - max(1, math.ceil(self.start * total - 1e-9))
        return late >= 0 and late % self.every == 0

    @torch.no_grad()
    def observe(
        self, step: int, total: int, parameters: Sequence[torch.nn.Parameter], memory: Memory
    ) -> None:
        if not self.counts(step, total):
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
            context.say(
                "finish: nothing was averaged, since the run ended before its late steps; the "
                "model is as trained (a smaller `start` begins earlier)."
            )
            context.notes["weight_averaging"] = {"points": 0}
            return context.lm
        means = context.memory["weight_averaging.mean"]
        for parameter, mean in zip(context.parameters.values(), means, strict=True):
            parameter.copy_(mean)
        points = int(context.memory["weight_averaging.count"][0])
        context.lm.touch()
        context.notes["weight_averaging"] = {"points": points}
        context.say(f"finish: the weights are the mean over {points} steps")
        return context.lm
