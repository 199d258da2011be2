"""Simple NPO: NPO without a reference model, on the mean log-probability per token.

    loss = (2 / beta) * softplus(beta * (log p(y | x) / |y| + delta))

per forget row, averaged over rows. Dividing by the answer's length |y| keeps long answers from
being forgotten first; ``delta`` is the margin on the mean negative log-likelihood that a row
should exceed (the paper writes the margin outside: gamma = beta * delta).

Paper: arXiv 2410.07163. Reference: github.com/OPTML-Group/Unlearn-Simple (TOFU).
Deviations: none in the loss. The same repository's MUSE scripts feed raw logits to the sigmoid;
that is not this loss and is not offered here.
"""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.preference import preference_loss
from delible.train.step import Step


def simnpo(
    logprob_sum: Float[Tensor, " rows"],
    token_count: Float[Tensor, " rows"],
    beta: float,
    delta: float = 0.0,
) -> Float[Tensor, " rows"]:
    """SimNPO loss per row, above 0; towards 0 once the answer is improbable per token."""
    return preference_loss(-(logprob_sum / token_count + delta), beta)


@register(
    kind="objective",
    name="simnpo",
    title="Simple negative preference optimisation",
    summary="NPO on the mean log-probability per token, without a reference model.",
    paper="2410.07163",
    year=2024,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=True,
    weakest="relearning; too little forgetting with untuned beta",
    badges=("parity",),
)
class SimNPO(Objective):
    """Options of SimNPO."""

    beta: float = Field(2.5, gt=0, description="Inverse temperature of the per-token mean.")
    delta: float = Field(
        0.0, description="Margin in nats per token that the mean loss should exceed."
    )

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        return simnpo(forget.logprob_sum, forget.token_count, self.beta, self.delta)
