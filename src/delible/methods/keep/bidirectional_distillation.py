"""Bidirectional logit distillation on retain rows: go on saying what the start model says.

    loss = mean of value over the first ``positions`` response positions

per retain row, averaged over rows; ``value`` copies the teacher's K largest logits and pushes down
the student's own (see :mod:`delible.train.distillation`). The teacher is the start model with the
instruction not to know the forgotten topic. On questions that it may answer its logits are almost
those of the start model, so the same loss that forgets also keeps, neighbours included.

Paper: arXiv 2604.15482 (no public code). Deviations: none known; the paper scores at least the
first response position.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.distillation import bidirectional
from delible.train.losses import Keep
from delible.train.step import Group


@register(
    kind="keep",
    name="bidirectional_distillation",
    title="Bidirectional logit distillation (retain rows)",
    summary="Keeps the logits of the instructed start model where retain answers begin.",
    paper="2604.15482",
    year=2026,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("experimental",),
)
class BidirectionalDistillation(Keep):
    """Options of bidirectional distillation on retain rows."""

    top: int = Field(20, ge=1, description="K: logits that count on each side.")
    negative_weight: float = Field(
        1.0, ge=0, description="Weight of pushing down what only the student would say."
    )
    threshold: float = Field(1.0, gt=0, description="Of the Huber function, in logits.")
    positions: int = Field(1, ge=1, description="Response positions that count, from the first.")

    reference: ClassVar[tuple[str, ...]] = ("answers",)
    instructed: ClassVar[bool] = True

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        def value(logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
            return bidirectional(logits, teacher, self.top, self.negative_weight, self.threshold)

        values = retain.map_logits(value, with_reference=True)[:, : self.positions]
        return values.sum(dim=1) / retain.mask[:, : self.positions].sum(dim=1)
