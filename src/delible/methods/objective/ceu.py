"""CE-U: cross-entropy to the model's own distribution without the true token.

    q_t  = softmax(z_t with the true token's logit at minus infinity), without gradient
    loss = - sum over answer tokens of sum_v q_t(v) * log p_t(v)

averaged over the answer tokens of the step that count; z_t are the logits that predict answer
token t and p_t their softmax. The first ``ignore_first_n`` answer tokens of each row do not count:
they rarely carry the answer, and changing them changes every answer. The gradient by the logits is
p_t - q_t, which is that of unlikelihood, -log(1 - p_t(y_t)).

Paper: arXiv 2503.01224. Reference: github.com/locuslab/open-unlearning (ceu.py).
Deviations: none in the loss. A row with no more than ``ignore_first_n`` answer tokens (the
end-of-turn token is one) is not forgotten at all; that is said, and refused if it is so for all.
What a row has fewer is missing in the mean's divisor, which can only happen from 2 on.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Row, Unit
from delible.train.step import Step


def ceu(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """CE-U loss per token in nats: the entropy of q_t at least, reached at p(target) = 0."""
    logits = logits.float()
    without = logits.detach().scatter(1, targets[:, None], -torch.inf).softmax(dim=1)
    return -(without * logits.log_softmax(dim=1)).sum(dim=1)


@register(
    kind="objective",
    name="ceu",
    title="Cross-entropy unlearning",
    summary="Moves each forget token's distribution to itself without the true token.",
    paper="2503.01224",
    year=2025,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; the first answer token is never forgotten",
    badges=("parity",),
)
class CEU(Objective):
    """Options of CE-U."""

    ignore_first_n: int = Field(
        1, ge=0, description="Answer tokens at the beginning of each answer that are left out."
    )

    unit: ClassVar[Unit] = "answer_token"

    def concerns(self, row: Row) -> bool:
        return row.encoded.answer_tokens > self.ignore_first_n

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        values = step.forget.map_logits(ceu)[:, self.ignore_first_n :].sum(dim=1)
        # the engine divides by all answer tokens
        tokens, rows = step.units("forget", "answer_token"), step.units("forget", "row")
        return values * (tokens / max(1, tokens - self.ignore_first_n * rows))
