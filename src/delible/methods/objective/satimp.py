"""SatImp: ascent weighted by saturation (still known) and importance (not a matter of course).

    gradient = sum over answer tokens of p_t^beta1 * (1 - p_t)^beta2 * gradient of log p_t

averaged over the answer tokens of the step, with p_t the probability of answer token t. beta1
passes over tokens that are forgotten, beta2 over those that any text would have there; the
weight is largest at p = beta1 / (beta1 + beta2). With beta2 0 this is WGA.

The published numbers differ. beta2 is 0.1 in the read-me of the authors' repository and 1 in
open-unlearning (the default here). Weights: forget 1 and retain 0.1 in the paper, tuned for
extraction strength, the other way round in the configuration that open-unlearning ships: a factor
of 100 in the ratio; set it with ``weighted_sum``.

Paper: arXiv 2505.11953. Reference: github.com/locuslab/open-unlearning.
Deviations: none in the gradient. Papers write the loss as weight * log p_t with the weight
detached, a number that does not fall as forgetting goes on. The value here is the integral of
that gradient, the incomplete beta function B(p_t; beta1, beta2 + 1), which falls to 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from scipy.special import beta as complete_beta
from scipy.special import betainc
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step

#: Largest log-probability that is told from certainty.
CERTAIN = -1e-6


def satimp_weight(
    logprobs: Float[Tensor, "rows answer"], beta1: float, beta2: float
) -> Float[Tensor, "rows answer"]:
    """Weight of each token's ascent, in [0, 1]: the gradient of the loss by log p."""
    # 1 - p by expm1, so that confident tokens keep their digits; a power below 1 has no slope at 0
    return (beta1 * logprobs).exp() * (-logprobs.clamp(max=CERTAIN).expm1()).pow(beta2)


class _Integral(torch.autograd.Function):
    """The incomplete beta function of p, whose gradient by log p is the weight."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, beta1: float, beta2: float) -> Tensor:
        ctx.save_for_backward(logprobs)
        ctx.powers = beta1, beta2
        share = betainc(beta1, beta2 + 1, logprobs.cpu().double().exp().numpy())
        return torch.from_numpy(share * complete_beta(beta1, beta2 + 1)).to(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (logprobs,) = ctx.saved_tensors
        return gradients[0] * satimp_weight(logprobs, *ctx.powers), None, None


def satimp(
    logprobs: Float[Tensor, "rows answer"], beta1: float, beta2: float
) -> Float[Tensor, "rows answer"]:
    """SatImp loss per token, 0 or more; 0 when forgotten.

    Args:
        logprobs: log p of each answer token.
        beta1: Power of p, above 0.
        beta2: Power of 1 - p, 0 or more.
    """
    values: Tensor = _Integral.apply(logprobs, beta1, beta2)
    return values


@register(
    kind="objective",
    name="satimp",
    title="SatImp",
    summary="Ascent on forget tokens that are still known and not a matter of course.",
    paper="2505.11953",
    year=2025,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; too little forgetting of answers that were never quite certain",
    badges=("parity",),
)
class SatImp(Objective):
    """Options of SatImp."""

    beta1: float = Field(
        5.0, gt=0, description="Saturation: power of the probability in the weight."
    )
    beta2: float = Field(
        1.0, ge=0, description="Importance: power of one minus the probability in the weight."
    )

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        values = satimp(forget.token_logprobs, self.beta1, self.beta2)
        return torch.where(forget.mask, values, 0.0).sum(dim=1)
