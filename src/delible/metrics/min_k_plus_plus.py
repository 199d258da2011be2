"""Min-K++: Min-K on log-probabilities that are standardised by the vocabulary's.

    z_t = (log p(y_t) - mu_t) / sqrt(max(var_t, 1e-6))
    mu_t = sum_v p_v log p_v,   var_t = sum_v p_v (log p_v)^2 - mu_t^2
    score = -mean of the lowest max(1, floor(k L')) values of z_t, t <= L'

so that a token counts as unlikely only where the model had a better idea. L' leaves out the
end-of-turn token. A larger score means: less likely a member. Paper: Zhang et al. 2024
(arXiv 2404.02936); for unlearning: RWKU (arXiv 2406.10890). Reference code:
locuslab/open-unlearning (k = 0.4), jinzhuoran/RWKU (k = 0.2, sign reversed).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from delible.measure.scoring.seen import TextAttack
from delible.registry import register
from delible.system.asks import TokenScores

#: A distribution that is all but certain has no spread to divide by.
LEAST_VARIANCE = 1e-6


def min_k_plus_plus(scores: TokenScores, share: float = 0.4, compat: bool = False) -> float | None:
    """Negative mean of the lowest standardised log-probabilities.

    Args:
        scores: Teacher-forced values with moments, shape [answer].
        share: Share of the tokens that count, in (0, 1]; at least one does.
        compat: Leave out the last token even when it is no end-of-turn token.

    Returns:
        A value in (-inf, inf); higher = less likely a member. ``None`` without tokens.
    """
    if scores.means is None or scores.variances is None:
        raise TypeError("min-k++ needs scores with moments")
    kept = scores.logprobs.size - int(scores.has_end or compat)
    if kept <= 0:
        return None
    spread = np.sqrt(np.maximum(scores.variances[:kept].astype(np.float64), LEAST_VARIANCE))
    standardised = np.sort((scores.logprobs[:kept] - scores.means[:kept].astype(float)) / spread)
    return -float(standardised[: max(1, int(share * kept))].mean())


@register(
    kind="metric",
    name="min_k_plus_plus",
    title="Min-K++",
    summary="Min-K on log-probabilities standardised by mean and spread of the vocabulary's.",
    paper="2404.02936",
    year=2024,
    family="membership",
    capability="distribution",
    changes="nothing",
    range="(-inf, inf)",
    direction="High: the text looks as if the model was never trained on it.",
    misleads="Says little alone: compare members with non-members of the same kind and time "
    "(metric 'membership'). A destroyed, uniform model gives about 0 for every text.",
    badges=("parity",),
)
class MinKPlusPlus(TextAttack):
    """Min-K++ score of a passage, or of an answer after its question."""

    share: float = Field(0.4, gt=0, le=1, description="Share of the tokens that count (k).")
    compat: bool = Field(False, description="Leave out the last token even when it is no end.")

    moments: ClassVar[bool] = True

    def value(self, scores: TokenScores, text: str) -> float | None:
        return min_k_plus_plus(scores, self.share, self.compat)
