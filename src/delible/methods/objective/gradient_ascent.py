"""Gradient ascent: the answer loss of the forget rows is climbed instead of descended.

    loss = sum over answer tokens of log p(y_t | x, y_<t)

averaged over the answer tokens of all forget rows of the step (minus the cross-entropy). It has
no lower bound, so it destroys the model after a few steps; it is the baseline that every other
forget loss is measured against, and NPO's first gradient on sums.

Paper: arXiv 2401.06121 (as a baseline of TOFU). Reference: github.com/locuslab/tofu.
Deviations: none. Released code averages over the tokens of a micro-batch, this one over those of
the whole optimiser step, so that gradient accumulation changes nothing.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


def gradient_ascent(logprob_sum: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The ascent loss per row: log p(answer | prompt), summed over its tokens, in (-inf, 0]."""
    return logprob_sum


@register(
    kind="objective",
    name="gradient_ascent",
    title="Gradient ascent",
    summary="Climbs the answer loss of the forget rows, without a bound.",
    paper="2401.06121",
    year=2024,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="utility: it collapses within a few steps",
    badges=("parity",),
)
class GradientAscent(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        return gradient_ascent(step.forget.logprob_sum)
