"""Deviation score: how far from forgetting all and keeping all, in one number.

    DS   = 100 sqrt(R_forget^2 + (1 - R_retain)^2)           R: mean ROUGE-L recall of the answers
    DDS  = mean_i s_i + beta / (T - 1) sum_i max(0, s_{i+1} - s_i)       over T requests in a row
    DUS  = 1 - sum_i |u_{i+1} - u_i| / (T - 1)

Paper: DRAGON (arXiv 2511.05784); code: supergirl-os/DRAGON. The dynamic scores take values that
were measured after each of several requests: deviation scores s, utilities u. The paper's beta is
not known here; 1 weighs a step back like the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field

from delible.measure.metric import SummaryMetric, SystemValues
from delible.registry import register

ROUGE = "rouge_l_recall"


def deviation(forget: float, retain: float) -> float:
    """DS from ROUGE of the forgotten and of the kept answers, each [0, 1]; [0, 141.4]."""
    return 100 * math.hypot(forget, 1 - retain)


def dynamic_deviation(scores: Sequence[float], beta: float = 1.0) -> float:
    """DDS of deviation scores, one per request in order; lower is better.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("a dynamic score needs the value after one request at least")
    worse = sum(max(0.0, after - before) for before, after in pairwise(scores))
    return sum(scores) / len(scores) + beta * worse / max(1, len(scores) - 1)


def dynamic_utility(utilities: Sequence[float]) -> float:
    """DUS of utilities, one per request in order; 1 if nothing moved.

    Raises:
        ValueError: There are no utilities.
    """
    if not utilities:
        raise ValueError("a dynamic score needs the value after one request at least")
    moved = sum(abs(after - before) for before, after in pairwise(utilities))
    return 1 - moved / max(1, len(utilities) - 1)


@register(
    kind="metric",
    name="deviation_score",
    title="Deviation score",
    summary="Distance from forgetting all and keeping all, by ROUGE of both.",
    paper="2511.05784",
    year=2026,
    family="trade-off",
    capability="generate",
    changes="nothing",
    range="[0, 141.4]",
    direction="0: nothing of the forgotten and all of the kept answers; lower is better.",
    misleads="A refusal that shares words with the answer counts as remembered; a model whose kept "
    "answers were poor before is blamed for them.",
)
class DeviationScore(SummaryMetric):
    """Key: ``deviation_score``."""

    forget_split: str = Field("forget", description="The forgotten records.")
    retain_split: str = Field("retain", description="The kept records.")

    def uses(self) -> tuple[str, ...]:
        return (ROUGE,)

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """The score; ``None`` where a split has no value."""
        means = values.means.get(ROUGE, {})
        forget, retain = means.get(self.forget_split), means.get(self.retain_split)
        if forget is None or retain is None:
            return {"deviation_score": None}
        return {"deviation_score": deviation(forget, retain)}
