"""Token-wise NPO (TNPO), and weighted TNPO: NPO's weight for each token instead of each row.

    gradient = sum over answer tokens of w_t * gradient of log p_t
    w_t      = 2 * p_t^(beta + a) / (p_t^beta + p_ref_t^beta + 1e-5)

averaged over the answer tokens of the step, with p_t the probability of answer token t and
p_ref_t that of the reference. a = 0 is TNPO: weight 1 at the start, 0 once the token is
forgotten. a > 0 is WTNPO, which passes over tokens that were improbable from the start.

Paper: arXiv 2502.19301. Reference: github.com/tmlr-group/G-effect (tnpo and wtnpo, beta 4 and a
1.5; in an early version ins_npo and w_ins_npo, the latter with beta 0.1).
Deviations: none in the gradient; 1e-5 is the released code's. Mind it at large beta: tokens with
p^beta far below 1e-5 (p below 0.06 for beta 4) count as forgotten whatever they were before.
Papers write the loss as w_t * log p_t with w_t detached, a number that does not fall as
forgetting goes on. The value here is the integral of that gradient: for a = 0

    (2 / beta) * log(1 + p_t^beta / (p_ref_t^beta + 1e-5))

and a hypergeometric function otherwise; both fall to 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from scipy.special import hyp2f1
from torch import Tensor
from torch.nn.functional import softplus

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step

#: Keeps the weight finite where both probabilities vanish (released code).
EPSILON = 1e-5


def tnpo_weight(
    logprobs: Float[Tensor, "rows answer"],
    reference_logprobs: Float[Tensor, "rows answer"],
    beta: float,
    a: float = 0.0,
) -> Float[Tensor, "rows answer"]:
    """Weight of each token's ascent, in [0, 2): the gradient of the loss by log p."""
    joint = (beta * logprobs).exp() + (beta * reference_logprobs).exp() + EPSILON
    return 2 * ((beta + a) * logprobs).exp() / joint


def _log_floor(reference_logprobs: Tensor, beta: float) -> Tensor:
    """log(p_ref^beta + epsilon), without underflow."""
    return torch.logaddexp(
        beta * reference_logprobs, torch.full_like(reference_logprobs, math.log(EPSILON))
    )


class _Integral(torch.autograd.Function):
    """The hypergeometric function of p whose gradient by log p is WTNPO's weight."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, reference_logprobs: Tensor, beta: float, a: float
    ) -> Tensor:
        ctx.save_for_backward(logprobs, reference_logprobs)
        ctx.powers = beta, a
        power, floor = beta + a, _log_floor(reference_logprobs, beta)
        odds = (beta * logprobs - floor).cpu().double().exp().numpy()
        tail = torch.from_numpy(hyp2f1(1, power / beta, power / beta + 1, -odds))
        return (2 / power) * (power * logprobs - floor).exp() * tail.to(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0] * tnpo_weight(*ctx.saved_tensors, *ctx.powers), None, None, None


def tnpo(
    logprobs: Float[Tensor, "rows answer"],
    reference_logprobs: Float[Tensor, "rows answer"],
    beta: float,
    a: float = 0.0,
) -> Float[Tensor, "rows answer"]:
    """TNPO (a = 0) or WTNPO loss per token, 0 or more; 0 when forgotten.

    Args:
        logprobs: log p of each answer token.
        reference_logprobs: The same of the reference model.
        beta: Inverse temperature, above 0.
        a: Additional power of p in the weight, 0 or more.
    """
    if a:
        values: Tensor = _Integral.apply(logprobs, reference_logprobs, beta, a)
        return values
    return (2 / beta) * softplus(beta * logprobs - _log_floor(reference_logprobs, beta))


@register(
    kind="objective",
    name="tnpo",
    title="Token-wise negative preference optimisation",
    summary="Ascent on each forget token that fades as the token becomes less likely than before.",
    paper="2502.19301",
    year=2025,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; 4-bit quantization",
    badges=("parity",),
)
class TNPO(Objective):
    """Options of TNPO and WTNPO."""

    beta: float = Field(4.0, gt=0, description="Inverse temperature; towards 0 it becomes ascent.")
    a: float = Field(
        0.0, ge=0, description="Additional power of the probability (WTNPO; the paper: 1.5)."
    )

    unit: ClassVar[Unit] = "answer_token"
    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        before = forget.reference.token_logprobs
        values = tnpo(forget.token_logprobs, before, self.beta, self.a)
        return torch.where(forget.mask, values, 0.0).sum(dim=1)
