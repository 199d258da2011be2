"""KTO with forget answers as undesired ones and refusals as the zero point.

    z    = max(0, log p(w | x) - log p_ref(w | x)), without gradient
    loss = 1 + (2 / beta) * softplus(beta * (log p(y | x) - log p_ref(y | x) - z))

per forget row, with y the answer to forget, w a refusal of the same question, and
log-probabilities summed over answer tokens; averaged over rows. At z = 0 it is NPO; once the
model has moved towards refusing, rows fade earlier.

Paper: arXiv 2402.01306 (KTO), 2404.05868 (for unlearning). Reference:
github.com/licong-lin/negative-preference-optimization (kto_logsigmoid).
Deviations: z is the row's own; released code takes the mean over a micro-batch, which makes the
result depend on how a step is cut. As in KTO, z is not below 0 and beta multiplies it: released
code leaves both out, so that refusals that become less likely raise the loss without limit.
``compat`` brings these two back, not the mean over the micro-batch: on batches of one row it is
the released loss.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.step import Step


def kto(
    log_ratio: Float[Tensor, " rows"],
    refusal_log_ratio: Float[Tensor, " rows"],
    beta: float,
    *,
    compat: bool = False,
) -> Float[Tensor, " rows"]:
    """KTO loss per row, above 1; towards 1 when forgotten.

    Args:
        log_ratio: log p - log p_ref of the answer to forget, summed over its tokens.
        refusal_log_ratio: The same of the refusal; takes no gradient.
        beta: Inverse temperature, above 0.
        compat: Neither cut the zero point at 0 nor multiply it by beta (released code).
    """
    zero = refusal_log_ratio.detach()
    zero = zero if compat else beta * zero.clamp(min=0)
    return 1 + (2 / beta) * softplus(beta * log_ratio - zero)


@register(
    kind="objective",
    name="kto",
    title="Kahneman-Tversky optimisation against forget answers",
    summary="NPO with a zero point that moves with the probability of refusals.",
    paper="2404.05868",
    year=2024,
    family="preference",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "refusals", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; 4-bit quantization",
    badges=("parity", "variant"),
    variant="The zero point is the row's own, at least 0 and multiplied by beta.",
)
class KTO(Objective):
    """Options of KTO."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature; towards 0 it becomes ascent.")
    compat: bool = Field(
        False, description="Neither cut the zero point at 0 nor multiply it by beta."
    )

    roles: ClassVar[tuple[Role, ...]] = ("forget", "refusal")
    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget, refusal = step.forget, step.refusal
        answer = forget.logprob_sum - forget.reference.logprob_sum
        declined = refusal.logprob_sum - refusal.reference.logprob_sum
        return kto(answer, declined, self.beta, compat=self.compat)
