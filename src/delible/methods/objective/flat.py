"""FLAT: raises a template answer and lowers the forget answer by one f-divergence.

    P(y) = (1 / |y|) * sum over answer tokens of p(y_t | x, y_<t)
    loss = - g(P(template)) + f*(g(P(forget)))

per forget row, averaged over rows. f* is the conjugate of the divergence's generator f and g its
output activation: the loss is minus the variational form of the divergence between the two
answers. P is a probability, so each token is moved in proportion to its own: a forgotten token
is left alone, and nothing diverges. Templates are the run's refusals; give other sentences
(``--refusals FILE``) for ordinary answers instead.

Paper: arXiv 2410.11143. Reference: github.com/UCSC-REAL/FLAT.
Deviations: released code gives reverse KL, squared Hellinger and Neyman the wrong sign or no
matching conjugate (the first two raise the forget answer, the third lowers the template); here
they are the textbook forms. It averages P over the whole row, prompt and padding included, and
applies g to the mean of a batch; here P is the answer's own mean, row by row. ``compat`` brings
back the signs and the average over the row (without padding: what a row is padded to is no part
of it). A row keeps one template, drawn once per run (released code: a new one at each visit).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.step import Group, Step

Divergence = Literal[
    "total_variation", "jensen_shannon", "pearson", "kl", "jeffrey", "reverse_kl",
    "squared_hellinger", "neyman",
]  # fmt: skip


def activation(score: Float[Tensor, " rows"], divergence: Divergence) -> Float[Tensor, " rows"]:
    """g(P), the output activation of a divergence: rises with P."""
    match divergence:
        case "total_variation":
            return score.tanh() / 2
        case "jensen_shannon":
            return math.log(2) + logsigmoid(score)
        case "pearson" | "kl" | "jeffrey":
            return score
        case "reverse_kl":
            return -(-score).exp()
        case "squared_hellinger" | "neyman":
            return -(-score).expm1()


def conjugate(score: Float[Tensor, " rows"], divergence: Divergence) -> Float[Tensor, " rows"]:
    """f*(g(P)), the conjugate at the activation: rises with P."""
    match divergence:
        case "total_variation":
            return score.tanh() / 2
        case "jensen_shannon":
            return softplus(score) - math.log(2)
        case "pearson":
            return score + score.pow(2) / 4
        case "kl":
            return (score - 1).exp()
        case "jeffrey":  # the conjugate has no closed form: its series, as in released code
            return score + score.pow(2) / 4 + score.pow(3) / 16
        case "reverse_kl":
            return score - 1
        case "squared_hellinger":
            return score.expm1()
        case "neyman":
            return 2 - 2 * (-score / 2).exp()


def flat(
    forget_score: Float[Tensor, " rows"],
    template_score: Float[Tensor, " rows"],
    divergence: Divergence,
    *,
    compat: bool = False,
) -> Float[Tensor, " rows"]:
    """FLAT loss per row, bounded; falls with the template's score, rises with the forget answer's.

    Args:
        forget_score: P of the answer to forget, in [0, 1].
        template_score: P of the template answer, in [0, 1].
        divergence: Which f-divergence.
        compat: Take the released code's forms of reverse KL, squared Hellinger and Neyman.
    """
    if compat and divergence == "reverse_kl":
        return template_score.exp() - 1 - forget_score
    if compat and divergence == "squared_hellinger":
        return template_score.expm1() + (-forget_score).expm1()
    if compat and divergence == "neyman":
        return template_score.expm1() + 2 - 2 * (1 - forget_score).clamp(min=1e-12).sqrt()
    return conjugate(forget_score, divergence) - activation(template_score, divergence)


@register(
    kind="objective",
    name="flat",
    title="Loss adjustment with forget data only (FLAT)",
    summary="Raises a template answer and lowers the forget answer by one f-divergence.",
    paper="2410.11143",
    year=2024,
    family="preference",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "refusals"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="prefilled answers; relearning",
    badges=("parity", "variant"),
    variant="Scores are means over the answer, per row; three divergences have corrected signs.",
)
class FLAT(Objective):
    """Options of FLAT."""

    divergence: Divergence = Field("total_variation", description="Which f-divergence.")
    compat: bool = Field(
        False, description="Signs and averages of the released code, to reproduce it."
    )

    roles: ClassVar[tuple[Role, ...]] = ("forget", "refusal")

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget, template = self._score(step.forget), self._score(step.refusal)
        return flat(forget, template, self.divergence, compat=self.compat)

    def _score(self, group: Group) -> Float[Tensor, " rows"]:
        total = (group.token_logprobs.exp() * group.mask).sum(dim=1)
        # a row of n tokens predicts n - 1
        return total / (group.positions.sum(dim=1) - 1 if self.compat else group.token_count)
