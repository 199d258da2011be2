"""Alternate preference optimisation: prefers a plausible false answer over each forget answer.

    margin = [log p(a | x) - log p_ref(a | x)] - [log p(y | x) - log p_ref(y | x)]
    loss   = (2 / beta) * softplus(-beta * margin)

per forget row, with y the answer to forget, a an alternate of the same question, and
log-probabilities summed over answer tokens; averaged over rows. DPO whose winner is a fluent
answer instead of a refusal, so that the model does not learn to decline.

Paper: arXiv 2409.13474. Reference: github.com/molereddy/Alternate-Preference-Optimization
(dataloader.py). Deviations: none in the loss. ``form`` offers the paper's ablation of two terms
that do not see each other.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.preference import preference_loss
from delible.train.step import Step


def altpo(
    winner_log_ratio: Float[Tensor, " rows"],
    loser_log_ratio: Float[Tensor, " rows"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """Preference loss per row; (2 / beta) log 2 at the start, towards 0 when the alternate won.

    Args:
        winner_log_ratio: log p - log p_ref of the alternate, summed over its tokens.
        loser_log_ratio: The same of the answer to forget.
    """
    return preference_loss(winner_log_ratio - loser_log_ratio, beta)


def altpo_separate(
    winner_log_ratio: Float[Tensor, " rows"],
    loser_log_ratio: Float[Tensor, " rows"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """The ablation: a winner's and a loser's half, each with a sigmoid of its own."""
    return preference_loss(winner_log_ratio, beta) + preference_loss(-loser_log_ratio, beta)


@register(
    kind="objective",
    name="altpo",
    title="Alternate preference optimisation",
    summary="Prefers a plausible false answer over each forget answer, relative to the start.",
    paper="2409.13474",
    year=2024,
    family="preference",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="teaches falsehoods; relearning brings the true answer back",
    badges=("parity",),
)
class AltPO(Objective):
    """Options of AltPO."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature; strength of the reference.")
    form: Literal["joint", "separate"] = Field(
        "joint", description="One margin of both answers, or a term for each (ablation)."
    )

    roles: ClassVar[tuple[Role, ...]] = ("forget", "alternate")
    reference: ClassVar[tuple[str, ...]] = ("logprobs",)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        winner, loser = step.alternate, step.forget
        function = altpo if self.form == "joint" else altpo_separate
        return function(
            winner.logprob_sum - winner.reference.logprob_sum,
            loser.logprob_sum - loser.reference.logprob_sum,
            self.beta,
        )
