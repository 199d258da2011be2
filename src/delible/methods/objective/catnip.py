"""CATNIP: token-wise negative preference against the model's own complement, 1 - p.

    loss = (1 / |y|) * sum over answer tokens of (2 / beta) * softplus(beta * log(p_t / r_t))
    r_t  = 1 - p_t

averaged over rows, so that long answers do not lead. It is NPO token by token with the start
model replaced by 1 - p_t: what counts is how confident the model is now, and nothing else is
needed, neither retain rows nor a reference. The weight on the gradient of log p_t is

    2 * p_t^beta / (p_t^beta + (1 - p_t)^beta)          with r_t detached (default)

and that times 1 / (1 - p_t) with r_t attached. With beta 1 the first is twice WGA's, the second
twice unlikelihood's.

Paper: arXiv 2602.02824 (no public code). Two ablations of the paper are options: ``against:
start`` takes the start model for r_t (token-wise NPO), ``tokenized: false`` has one sigmoid per
answer, on its mean log-probability.
Deviations: whether the paper detaches r_t, its beta and the factor 2 / beta (NPO's) are taken
from its words on "weights in proportion to confidence", not from code. Attached, weights grow
without bound on memorised tokens; ``max_weight`` caps them. log p is capped at -1e-6 in r_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.preference import preference_loss
from delible.train.step import Group, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Largest log-probability that is told from certainty.
CERTAIN = -1e-6


def log_complement(logprobs: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """log(1 - p) from log p, at least log 1e-6; the gradient does not stop at the cap."""
    capped = logprobs + (logprobs.detach().clamp(max=CERTAIN) - logprobs.detach())
    return torch.log(-torch.expm1(capped))


def catnip_weight(
    logprobs: Float[Tensor, "*tokens"], beta: float, *, attached: bool = False
) -> Float[Tensor, "*tokens"]:
    """Weight of the gradient of log p, without gradient: 0 to 2, or without bound if attached."""
    known = logprobs.detach()
    complement = log_complement(known)
    weight = 2 * torch.sigmoid(beta * (known - complement))
    return weight / complement.exp() if attached else weight


def catnip(
    logprobs: Float[Tensor, "*tokens"],
    beta: float,
    *,
    attached: bool = False,
    max_weight: float | None = None,
) -> Float[Tensor, "*tokens"]:
    """CATNIP loss per token, 0 or more; 0 when forgotten.

    Args:
        logprobs: log p of each answer token.
        beta: Inverse temperature, above 0.
        attached: Whether the gradient also goes through the complement.
        max_weight: Largest weight of the gradient of log p if attached; None: no limit.
    """
    complement = log_complement(logprobs)
    if not attached:
        complement = complement.detach()
    values = preference_loss(complement - logprobs, beta)
    if not attached or max_weight is None:
        return values
    too_large = catnip_weight(logprobs, beta, attached=True) > max_weight
    # the same value, with the largest slope that is allowed
    limited = values.detach() + max_weight * (logprobs - logprobs.detach())
    return torch.where(too_large, limited, values)


def answer_mean(
    values: Float[Tensor, "rows answer"], counted: Bool[Tensor, "rows answer"]
) -> Float[Tensor, " rows"]:
    """Mean over the answer tokens that count, row by row."""
    return torch.where(counted, values, 0.0).sum(dim=1) / counted.sum(dim=1)


@register(
    kind="objective",
    name="catnip",
    title="Calibrated and tokenized negative preference",
    summary="Ascent on each forget token in proportion to the model's confidence, per answer.",
    paper="2602.02824",
    year=2026,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; paraphrases",
    badges=("parity",),
)
class CATNIP(Objective):
    """Options of CATNIP."""

    beta: float = Field(
        1.0, gt=0, description="Inverse temperature; towards 0 it becomes ascent on every token."
    )
    attached: bool = Field(
        False, description="Let the gradient go through the complement 1 - p as well."
    )
    max_weight: float | None = Field(
        20.0, gt=0, description="Largest weight of a token if `attached`; none: no limit."
    )
    against: Literal["complement", "start"] = Field(
        "complement", description="Reference policy: 1 - p, or the start model (TNPO)."
    )
    tokenized: bool = Field(
        True, description="One term per token; false: one per answer, on its mean log-probability."
    )
    mask_end: bool = Field(
        True, description="Leave the end-of-turn token out, lest answers never end."
    )

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return ("logprobs",) if self.against == "start" else ()

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        counted = self._counted(forget)
        own, before = forget.token_logprobs, None
        if self.against == "start":
            before = forget.reference.token_logprobs
        if self.tokenized:
            return answer_mean(self._terms(own, before), counted)
        whole = None if before is None else answer_mean(before, counted)
        return self._terms(answer_mean(own, counted), whole)

    def _terms(self, own: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            return catnip(own, self.beta, attached=self.attached, max_weight=self.max_weight)
        return preference_loss(before - own, self.beta)

    def _counted(self, forget: Group) -> Bool[Tensor, "rows answer"]:
        """Answer tokens that count: all but the end of the turn, where there is another."""
        counts = forget.mask.sum(dim=1)
        if self.mask_end:
            ends = [row.encoded.has_end for row in forget.rows]
            counts = (counts - torch.tensor(ends, device=counts.device).int()).clamp(min=1)
        return torch.arange(forget.mask.shape[1], device=counts.device)[None] < counts[:, None]
