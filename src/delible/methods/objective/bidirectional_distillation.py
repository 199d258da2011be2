"""Bidirectional logit distillation on forget rows: say what an instructed teacher would say.

    loss = 1/2 * value(first response position of the plain question)
         + 1/2 * mean of value over the hardest prefilled position and the ``further`` next ones

per forget row, averaged over rows; ``value`` copies the teacher's K largest logits and pushes down
the student's own (see :mod:`delible.train.distillation`). The teacher is the start model that is
told what it must not know; the trained model never sees that instruction. The hardest position is
the one, among the first ``longest_prefill`` tokens of a lured answer, after which the student is
surest of what the teacher would not say: the inner maximisation against prefilling.

Paper: arXiv 2604.15482 (no public code). Deviations, where the paper leaves it open: one prefilled
answer holds all candidates at once (every cut of it is one), so that they cost one forward pass;
the four sets of the paper are the two halves here and two kinds of retain rows under
``keep: bidirectional_distillation``, which makes equal shares with equal weights.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.distillation import bidirectional, overconfidence
from delible.train.losses import Objective, Role
from delible.train.step import Group, Step


def hardest(
    confidence: Float[Tensor, "batch answer"], mask: Bool[Tensor, "batch answer"], longest: int
) -> Int[Tensor, " batch"]:
    """Position after 1 to ``longest`` tokens with the largest confidence; 0 if there is none."""
    places = torch.arange(confidence.shape[1], device=confidence.device)[None]
    open_ = mask & (places >= 1) & (places <= longest)
    return confidence.masked_fill(~open_, -1.0).argmax(dim=1) * open_.any(dim=1)


def window_mean(
    values: Float[Tensor, "batch answer"],
    mask: Bool[Tensor, "batch answer"],
    start: Int[Tensor, " batch"],
    further: int,
) -> Float[Tensor, " batch"]:
    """Mean over the positions from ``start`` to ``start + further`` that exist."""
    places = torch.arange(values.shape[1], device=values.device)[None]
    inside = mask & (places >= start[:, None]) & (places <= start[:, None] + further)
    return (values * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)


@register(
    kind="objective",
    name="bidirectional_distillation",
    title="Bidirectional logit distillation (forget rows)",
    summary="Copies the logits of the start model that is told what to refuse, also if prefilled.",
    paper="2604.15482",
    year=2026,
    family="distillation",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; a teacher that leaks teaches to leak",
    badges=("experimental",),
)
class BidirectionalDistillation(Objective):
    """Options of bidirectional distillation on forget rows."""

    top: int = Field(20, ge=1, description="K: logits that count on each side.")
    negative_weight: float = Field(
        1.0, ge=0, description="Weight of pushing down what only the student would say."
    )
    threshold: float = Field(1.0, gt=0, description="Of the Huber function, in logits.")
    longest_prefill: int = Field(
        12, ge=1, description="Tokens of a lured answer among which the hardest cut is looked for."
    )
    further: int = Field(4, ge=0, description="Positions after the hardest cut that count too.")

    roles: ClassVar[tuple[Role, ...]] = ("forget", "prefilled")
    reference: ClassVar[tuple[str, ...]] = ("answers",)
    instructed: ClassVar[bool] = True

    def _values(self, group: Group) -> Float[Tensor, "batch answer"]:
        def value(logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
            return bidirectional(logits, teacher, self.top, self.negative_weight, self.threshold)

        return group.map_logits(value, with_reference=True)

    def _hardest(self, group: Group) -> Int[Tensor, " batch"]:
        def confidence(logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
            return overconfidence(logits, teacher, self.top)

        with torch.no_grad():
            found = group.map_logits(confidence, with_reference=True)
        return hardest(found, group.mask, self.longest_prefill)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        plain = self._values(step.forget)[:, 0]
        lured = step.prefilled
        start = self._hardest(lured)
        robust = window_mean(self._values(lured), lured.mask, start, self.further)
        return 0.5 * (plain + robust)
