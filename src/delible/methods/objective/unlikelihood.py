"""Unlikelihood: lowers each answer token's probability until it is 0, and no further.

    loss = - sum over answer tokens of log(1 - p_t)

averaged over the answer tokens of the step, with p_t the probability of answer token t. Bounded
below by 0; the gradient on log p_t has weight p_t / (1 - p_t), which vanishes for forgotten
tokens and is largest for memorised ones.

Paper: arXiv 1908.04319 (for text generation). Reference:
github.com/facebookresearch/unlikelihood_training.
Deviations: none in the loss. log p is capped at -1e-6, so that a token which fp32 calls certain
has a large weight instead of an infinite one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step

#: Largest log-probability that is told from certainty.
CERTAIN = -1e-6


def unlikelihood(logprobs: Float[Tensor, "rows answer"]) -> Float[Tensor, "rows answer"]:
    """Unlikelihood loss per token: -log(1 - p) in nats, 0 or more; 0 when forgotten."""
    capped = logprobs + (logprobs.detach().clamp(max=CERTAIN) - logprobs.detach())
    return -torch.log(-torch.expm1(capped))


@register(
    kind="objective",
    name="unlikelihood",
    title="Unlikelihood",
    summary="Lowers the probability of each forget token until it is 0, and no further.",
    paper="1908.04319",
    year=2019,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="utility: certain tokens, function words first, have the largest weights",
    badges=("parity",),
)
class Unlikelihood(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        return torch.where(forget.mask, unlikelihood(forget.token_logprobs), 0.0).sum(dim=1)
