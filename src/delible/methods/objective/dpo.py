"""Direct preference optimisation with a refusal as the preferred answer (IdkDPO).

    margin = [log p(w | x) - log p_ref(w | x)] - [log p(y | x) - log p_ref(y | x)]
    loss   = (2 / beta) * softplus(-beta * margin)

per forget row, with y the answer to forget, w a refusal of the same question, and
log-probabilities summed over answer tokens; averaged over rows. Without the winner's half this
is NPO.

Paper: arXiv 2305.18290 (DPO), 2404.05868 (for unlearning). Reference:
github.com/licong-lin/negative-preference-optimization, github.com/locuslab/open-unlearning.
Deviations: each row keeps one refusal, drawn once per run, so that its reference value is
computed once. The factor 2 / beta, which some code leaves out, is that of NPO: it makes weights
against the retain loss comparable between the two.
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


def dpo(
    winner_log_ratio: Float[Tensor, " rows"],
    loser_log_ratio: Float[Tensor, " rows"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """DPO loss per row; (2 / beta) log 2 at the start, towards 0 when the winner has won.

    Args:
        winner_log_ratio: log p - log p_ref of the preferred answer, summed over its tokens.
        loser_log_ratio: The same of the answer to forget.
    """
    return preference_loss(winner_log_ratio - loser_log_ratio, beta)


@register(
    kind="objective",
    name="dpo",
    title="Direct preference optimisation towards refusals",
    summary="Prefers a refusal over each forget answer, relative to the start model.",
    paper="2404.05868",
    year=2024,
    family="preference",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "refusals", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="refusals spread to retain questions; answer probabilities stay",
    badges=("parity",),
)
class DPO(Objective):
    """Options of DPO."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature; strength of the reference.")

    roles: ClassVar[tuple[Role, ...]] = ("forget", "refusal")
    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        winner, loser = step.refusal, step.forget
        return dpo(
            winner.logprob_sum - winner.reference.logprob_sum,
            loser.logprob_sum - loser.reference.logprob_sum,
            self.beta,
        )
