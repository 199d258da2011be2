"""Coresets by score: a small share of the forget rows with the highest scores stands for all.

What the scored selections share; each of them says what a row's score is.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import RunError
from delible.train.slots import Select, SlotContext

logger = logging.getLogger(__name__)


def coreset_size(available: int, share: float) -> int:
    """round(share x available), at least 1."""
    return min(available, max(1, round(share * available)))


def highest(scores: Float[Tensor, " rows"], count: int) -> list[int]:
    """Indices of the ``count`` highest scores, ascending; of equal scores the earlier rows.

    Raises:
        RunError: A score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise RunError(
            f"the score of forget record {row + 1} is not finite.",
            hint="Check the model's loss on this record.",
        )
    order = torch.sort(scores.double(), descending=True, stable=True).indices
    return sorted(order[:count].tolist())


class ScoredSelect(Select):
    """Options of every selection by score."""

    share: float = Field(0.05, gt=0, le=1, description="Share of the forget rows; 1 takes all.")
    lowest: bool = Field(False, description="Take the lowest scores instead (to compare with).")

    def scores(self, context: SlotContext) -> Float[Tensor, " rows"]:
        """One score per forget row; higher = chosen earlier."""
        raise NotImplementedError

    def choose(self, context: SlotContext) -> list[int]:
        available = len(context.rows["forget"])
        count = coreset_size(available, self.share)
        if count == available:  # nothing to decide, so nothing to compute
            return list(range(available))
        scores = self.scores(context)
        chosen = highest(-scores if self.lowest else scores, count)
        logger.info(
            f"select: {count} of {available} forget rows with the "
            f"{'lowest' if self.lowest else 'highest'} scores; equal updates take "
            f"{available / count:.3g} times the epochs"
        )
        return chosen
