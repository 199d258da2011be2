"""Weighted gradient ascent: ascent on each token in proportion to how confident the model still is.

    gradient = sum over answer tokens of p_t^beta * gradient of log p_t

averaged over the answer tokens of the step, with p_t the probability of answer token t. Tokens
that are forgotten get weight 0, so the ascent ends where plain ascent (beta 0) goes on and
destroys the model.

Paper: arXiv 2502.19301. Reference: github.com/tmlr-group/G-effect,
github.com/locuslab/open-unlearning.
Deviations: none in the gradient. Papers write the loss as p_t^beta * log p_t with the weight
detached, a number that rises again below p = e^(-1 / beta) although the token is being
forgotten. The loss here is p_t^beta / beta, whose own gradient is the same: it falls as long as
forgetting goes on, towards 0. With beta 1 it is the expected number of right answer tokens.
Released code allocates a frozen copy of the model that it never asks; there is none here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


def wga_weight(logprobs: Float[Tensor, "rows answer"], beta: float) -> Float[Tensor, "rows answer"]:
    """Weight of each token's ascent, p^beta, in [0, 1]: the gradient of the loss by log p."""
    return (beta * logprobs).exp()


def wga(logprobs: Float[Tensor, "rows answer"], beta: float) -> Float[Tensor, "rows answer"]:
    """WGA loss per token: p^beta / beta in [0, 1 / beta], 0 when forgotten; log p if beta is 0."""
    return (beta * logprobs).exp() / beta if beta else logprobs


@register(
    kind="objective",
    name="wga",
    title="Weighted gradient ascent",
    summary="Ascent on each forget token, weighted by the probability it still has.",
    paper="2502.19301",
    year=2025,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning: improbable tokens are left alone, so the knowledge is near",
    badges=("parity",),
)
class WGA(Objective):
    """Options of weighted gradient ascent."""

    beta: float = Field(
        1.0, ge=0, description="Power of the probability in the weight; 0 is plain ascent."
    )

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        return torch.where(forget.mask, wga(forget.token_logprobs, self.beta), 0.0).sum(dim=1)
