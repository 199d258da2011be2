"""MEOW: plain fine-tuning on inverted facts, so that false answers take the place of true ones.

    loss = - sum over the alternate's tokens of log p(a_t | x, a_<t)
           + kl_weight * sum over the same tokens of KL(p_ref || p)

averaged over the alternate tokens of the step. The forget answer itself is never seen: what is
overwritten is where the model was surest (see the selection ``memo``).

Paper: arXiv 2409.11844. Reference: github.com/Carol-gutianle/MEOW (meow/trainer.py).
Deviations: the divergence is taken at answer tokens only and has their mean; released code sums it
over every position, prompt and padding included, and divides by all of them. Released code also
reads the first half of a question's rows only. Its variant with a retain loss is ``keep: nll`` with
weights 0.9 and 0.1, its preference variant the objective ``altpo``, its variant without selection
``select: all``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.row import Unit
from delible.train.step import Step

if TYPE_CHECKING:
    from delible.lm.lm import LM


def divergence(
    logits: Float[Tensor, "tokens vocab"],
    targets: Tensor,
    reference_logits: Float[Tensor, "tokens vocab"],
) -> Float[Tensor, " tokens"]:
    """KL(reference || model) per token in nats, 0 or more."""
    reference = reference_logits.float().log_softmax(dim=1)
    return (reference.exp() * (reference - logits.float().log_softmax(dim=1))).sum(dim=1)


@register(
    kind="objective",
    name="meow",
    title="Fine-tuning on inverted facts",
    summary="Teaches false but fluent answers to the forget questions.",
    paper="2409.11844",
    year=2024,
    family="relabelling",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="teaches falsehoods about the subject; paraphrases and relearning",
    badges=("parity", "variant"),
    variant="Every row counts, and the divergence at answer tokens only; released code takes the "
    "divergence at all positions, padding too, and half of the rows.",
)
class MEOW(Objective):
    """Options of MEOW."""

    kl_weight: float = Field(
        0.0, ge=0, description="Weight of KL(reference || model) on the same answer tokens."
    )

    unit: ClassVar[Unit] = "answer_token"
    roles: ClassVar[tuple[Role, ...]] = ("alternate",)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return ("answers",) if self.kl_weight else ()

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        values = -step.alternate.logprob_sum
        if self.kl_weight:
            apart = step.alternate.map_logits(divergence, with_reference=True).sum(dim=1)
            values = values + self.kl_weight * apart
        return values
