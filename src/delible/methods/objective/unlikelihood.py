"""Unlikelihood: lowers each answer token's probability until it is 0, and no further.

    loss = - sum over answer tokens of log(1 - p_t)

averaged over the answer tokens of the step, with p_t the probability of answer token t. Bounded
below by 0; the gradient on log p_t has weight p_t / (1 - p_t), which vanishes for forgotten
tokens and grows without bound for memorised ones. The gradient on the token's own logit is p_t,
at most 1.

Paper: arXiv 1908.04319 (for text generation). Reference:
github.com/facebookresearch/unlikelihood_training.
Deviations: none in the loss. log(1 - p) is taken from the other tokens' logits (the reference
takes it from p, at least 1e-5), so that tokens which fp32 calls certain keep their gradient.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from delible.lm.forward import complement_logprobs
from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


def unlikelihood(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Unlikelihood loss per token: -log(1 - p) in nats, 0 or more; 0 when forgotten."""
    return -complement_logprobs(logits, targets)


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
        return step.forget.map_logits(unlikelihood).sum(dim=1)
