"""A novice instead of a blank: NPO, and learning to err as beginners do.

    loss = (2 / beta) * softplus(beta * (log p(y | x) - log p_ref(y | x)))
           - misconception_weight / |w| * log p(w | x)

per forget row, with y the answer to forget and w a wrong answer that a beginner would give (the
role ``alternate``), log-probabilities summed over answer tokens; averaged over rows. Ordinary
unlearning leaves refusals or noise; the second term leaves a mistake that a lesson can correct.
How far it goes is set by ``training.stop_at_accuracy``.

Paper: arXiv 2603.26142, of which no code and no loss is public: NPO as base and the weight of the
second term are ours. With weight 0 it is NPO.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.preference import preference_loss
from delible.train.step import Step


@register(
    kind="objective",
    name="novice",
    title="Novice by misconception",
    summary="Makes each forget answer fade as NPO does and a beginner's mistake take its place.",
    paper="2603.26142",
    year=2026,
    family="relabelling",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning (a novice is meant to be teachable); teaches falsehoods",
    badges=("variant",),
    variant="The paper's loss is not public; NPO with a misconception target stands for it.",
)
class Novice(Objective):
    """Options of the novice."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature of NPO.")
    misconception_weight: float = Field(
        0.3, ge=0, description="Weight of the wrong answer's mean token loss; 0 is NPO."
    )

    roles: ClassVar[tuple[Role, ...]] = ("forget", "alternate")
    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget, wrong = step.forget, step.alternate
        fading = preference_loss(forget.reference.logprob_sum - forget.logprob_sum, self.beta)
        return fading - self.misconception_weight * wrong.logprob_sum / wrong.token_count
