"""Retain loss: on retain rows the likeliest token stays the one that it was.

    loss = - sum over answer tokens of log p(argmax of the reference | x, y_<t)

averaged over the answer tokens of all retain rows of the step. A hard form of the KL divergence:
cheaper to satisfy, and it sharpens what the reference was unsure of.

Paper: arXiv 2410.02760 (ELM). Reference code: github.com/rohitgandikota/erasing-llm.
Deviations: answer tokens only, where released code takes every position of a plain text.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.lm.forward import target_logprobs
from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group


def to_likeliest(
    logits: Float[Tensor, "tokens vocab"], reference: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """-log p of the reference's likeliest token, per token in nats, 0 or more."""
    return -target_logprobs(logits, reference.argmax(dim=1))


@register(
    kind="keep",
    name="reference_argmax",
    title="The reference's likeliest tokens on retain rows",
    summary="Teaches the retain rows' tokens that the reference found likeliest.",
    paper="2410.02760",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="Answer positions only.",
)
class ReferenceArgmax(Keep):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"
    reference: ClassVar[tuple[str, ...]] = ("answers",)

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        def likeliest(logits: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
            return to_likeliest(logits, reference)

        return retain.map_logits(likeliest, with_reference=True).sum(dim=1)
