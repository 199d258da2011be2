"""Retain loss: the model is to say nothing in particular at retain answers.

    loss = sum over answer tokens of KL(U || p) = sum_t mean_v( log 1/|V| - log p(v | x, y_<t) )

averaged over the answer tokens of all retain rows of the step; 0 where all tokens are equally
likely. Its gradient is that of the cross-entropy to the uniform distribution. For an assistant that
is taken away from another model: where it is flat, it takes nothing.

Paper: arXiv 2406.08607 (ULD). Reference code: UCSB-NLP-Chang/ULD.
Deviations: the released code averages over every position, prompt and padding included; here only
positions that predict answer tokens count, so that the question of a retain row, which is often
that of a forget row, is not flattened.
"""

from __future__ import annotations

import math
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group


def kl_from_uniform(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """KL(U || model) per token in nats, 0 or more; 0 for logits that are all the same."""
    logits = logits.float()
    return logits.logsumexp(dim=1) - logits.mean(dim=1) - math.log(logits.shape[1])


@register(
    kind="keep",
    name="uniform",
    title="Uniform answers on retain rows",
    summary="Makes every token as likely as any other at retain answers (for an assistant).",
    paper="2406.08607",
    year=2024,
    family="retain",
    needs=("retain",),
    changes="weights",
    badges=("parity", "variant"),
    variant="Answer positions only; the released code also averages over prompts and padding.",
)
class Uniform(Keep):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        def divergence(logits: Tensor, targets: Tensor) -> Tensor:
            return kl_from_uniform(logits)

        return retain.map_logits(divergence).sum(dim=1)
