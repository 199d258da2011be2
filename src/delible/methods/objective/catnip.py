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
from its words on "weights in proportion to confidence", not from code. log r_t is taken from the
other tokens' logits, so that tokens which fp32 calls certain keep their gradient. Attached, the
weight of log p_t has no bound, but the gradient on logits has: it is at most 2, and near 2 for
memorised tokens. ``max_weight`` limits the weight, and with it takes memorised tokens out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.lm.forward import complement_logprobs, target_logprobs
from delible.registry import register
from delible.train.losses import Objective
from delible.train.preference import preference_loss
from delible.train.step import Group, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Smallest 1 - p of a whole answer that is told from 0.
SMALLEST = 1e-30


def exact_logprobs(
    logprobs: Float[Tensor, "*tokens"], complement: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """log p with all its digits: by way of log(1 - p) where p is above a half."""
    likely = complement < -math.log(2)
    by_complement = torch.log1p(-complement.clamp(max=-math.log(2)).exp())
    return torch.where(likely, by_complement, logprobs)


def log_complement(logprobs: Float[Tensor, "*answers"]) -> Float[Tensor, "*answers"]:
    """log(1 - p) from log p, at least log 1e-30; the gradient does not stop there."""
    capped = logprobs + (logprobs.detach().clamp(max=-SMALLEST) - logprobs.detach())
    return torch.log(-torch.expm1(capped))


def catnip_weight(
    logprobs: Float[Tensor, "*tokens"],
    complement: Float[Tensor, "*tokens"],
    beta: float,
    *,
    attached: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Weight of the gradient of log p, without gradient: 0 to 2, or without bound if attached."""
    weight = 2 * torch.sigmoid(beta * (logprobs.detach() - complement.detach()))
    return weight / complement.detach().exp() if attached else weight


def catnip(
    logprobs: Float[Tensor, "*tokens"],
    complement: Float[Tensor, "*tokens"],
    beta: float,
    *,
    attached: bool = False,
    max_weight: float | None = None,
) -> Float[Tensor, "*tokens"]:
    """CATNIP loss per token, 0 or more; 0 when forgotten.

    Args:
        logprobs: log p of each answer token.
        complement: log(1 - p) of each answer token.
        beta: Inverse temperature, above 0.
        attached: Whether the gradient also goes through the complement.
        max_weight: Largest weight of the gradient of log p if attached; None: no limit.
    """
    if not attached:
        complement = complement.detach()
    values = preference_loss(complement - logprobs, beta)
    if not attached or max_weight is None:
        return values
    too_large = catnip_weight(logprobs, complement, beta, attached=True) > max_weight
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
        None, gt=0, description="Largest weight of log p if `attached`; none: no limit."
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
        if self.against == "start":
            own, before = forget.token_logprobs, forget.reference.token_logprobs
            if not self.tokenized:
                own, before = answer_mean(own, counted), answer_mean(before, counted)
            values = preference_loss(before - own, self.beta)
        elif self.tokenized:
            values = forget.map_logits(self._token_values)
        else:
            complements = forget.map_logits(complement_logprobs)
            mean = answer_mean(exact_logprobs(forget.token_logprobs, complements), counted)
            values = self._values(mean, log_complement(mean))
        return answer_mean(values, counted) if self.tokenized else values

    def _values(self, own: Tensor, complement: Tensor) -> Tensor:
        return catnip(
            own, complement, self.beta, attached=self.attached, max_weight=self.max_weight
        )

    def _token_values(
        self, logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        complement = complement_logprobs(logits, targets)
        own = exact_logprobs(target_logprobs(logits, targets), complement)
        return self._values(own, complement)

    def _counted(self, forget: Group) -> Bool[Tensor, "rows answer"]:
        """Answer tokens that count: all but the end of the turn, where there is another."""
        counts = forget.mask.sum(dim=1)
        if self.mask_end:
            ends = [row.encoded.has_end for row in forget.rows]
            counts = (counts - torch.tensor(ends, device=counts.device).int()).clamp(min=1)
        return torch.arange(forget.mask.shape[1], device=counts.device)[None] < counts[:, None]
