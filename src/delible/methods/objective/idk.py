"""IDK fine-tuning: teaches a refusal as the answer to each forget question.

    loss = - sum over the refusal's tokens of log p(w_t | x, w_<t)

averaged over the refusal tokens of the step. The forget answer itself is never seen, so what is
learned is when to decline, not what to forget.

Paper: arXiv 2401.06121 (preference optimisation in TOFU). Reference:
github.com/licong-lin/negative-preference-optimization.
Deviations: released code takes one token mean over refusal and retain rows together, which
weighs the two by their lengths; here each has its own mean and its own weight (the joint mean is
the special case of weights in the ratio of tokens). Refusals are drawn once per run.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.row import Unit
from delible.train.step import Step


@register(
    kind="objective",
    name="idk",
    title="IDK fine-tuning",
    summary="Teaches refusals as answers to the forget questions.",
    paper="2401.06121",
    year=2024,
    family="preference",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "refusals"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="paraphrases and prefilled answers: the knowledge stays",
    badges=("parity", "variant"),
    variant="Refusal and retain rows have a token mean each instead of a joint one.",
)
class IDK(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"
    roles: ClassVar[tuple[Role, ...]] = ("refusal",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        return -step.refusal.logprob_sum
