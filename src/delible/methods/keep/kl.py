"""Retain loss: KL divergence from the reference model to the trained one on retain answers.

    loss = sum over answer tokens of sum_v p_ref(v) * (log p_ref(v) - log p(v))

over the whole vocabulary, averaged over the answer tokens of all retain rows of the step. Unlike
the likelihood it keeps what the model says besides the answer, and teaches nothing new.

Paper: arXiv 2404.05868 and 2401.06121 (KL minimisation). Reference:
github.com/licong-lin/negative-preference-optimization, github.com/locuslab/open-unlearning.
Deviations: papers write KL(model || reference), all released code computes
KL(reference || model), and so does this. Released code averages over every position, prompt and
padding included, so that long padding makes the term weak; here only positions that predict
answer tokens count.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group


def kl_from_reference(
    logits: Float[Tensor, "tokens vocab"], reference_logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(reference || model) per token in nats, 0 or more; 0 when both agree."""
    reference = reference_logits.float().log_softmax(dim=1)
    return (reference.exp() * (reference - logits.float().log_softmax(dim=1))).sum(dim=1)


@register(
    kind="keep",
    name="kl",
    title="KL to the reference on retain rows",
    summary="Keeps the whole answer distribution of retain rows where the reference had it.",
    paper="2404.05868",
    year=2024,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="Answer positions only; released code also averages over prompts and padding.",
)
class KL(Keep):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"
    reference: ClassVar[tuple[str, ...]] = ("answers",)

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        def divergence(logits: Tensor, targets: Tensor, reference_logits: Tensor) -> Tensor:
            return kl_from_reference(logits, reference_logits)

        return retain.map_logits(divergence, with_reference=True).sum(dim=1)
