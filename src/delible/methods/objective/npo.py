"""Negative preference optimisation: ascent that fades once a row is forgotten.

    loss = (2 / beta) * softplus(beta * (log p(y | x) - log p_ref(y | x)))

per forget row, with log-probabilities summed over answer tokens; averaged over rows. At the
start its gradient is that of gradient ascent on sums; each row's weight falls to 0 as the row
becomes improbable, so the divergence is logarithmic in the steps instead of linear.

Paper: arXiv 2404.05868. Reference: github.com/licong-lin/negative-preference-optimization.
Deviations: none in the loss. Another published code base puts raw logits into the sigmoid;
that is not this loss and is not offered here.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.preference import preference_loss
from delible.train.step import Step


def npo(
    logprob_sum: Float[Tensor, " rows"],
    reference_logprob_sum: Float[Tensor, " rows"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """NPO loss per row; (2 / beta) log 2 where both models agree, towards 0 when forgotten."""
    return preference_loss(reference_logprob_sum - logprob_sum, beta)


@register(
    kind="objective",
    name="npo",
    title="Negative preference optimisation",
    summary="Ascent on each forget row that fades as the row becomes less likely than before.",
    paper="2404.05868",
    year=2024,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; 4-bit quantization",
    badges=("parity",),
)
class NPO(Objective):
    """Options of NPO."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature; towards 0 it becomes ascent.")

    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        return npo(forget.logprob_sum, forget.reference.logprob_sum, self.beta)
