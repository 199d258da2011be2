"""Min-K: a text that was never seen has a few tokens that the model finds very unlikely.

    score = -mean of the lowest max(1, floor(k L')) values of log p(y_t | x, y_<t), t <= L'

L' leaves out the end-of-turn token. A larger score means: less likely a member. Paper: Shi et al.
2023 (arXiv 2310.16789); for unlearning: MUSE (arXiv 2407.06460), k = 0.4. Reference code:
locuslab/open-unlearning, swj0419/muse_bench, jinzhuoran/RWKU (k = 0.2, sign reversed). Deviations:
open-unlearning leaves out the last token of plain text too and gives 0 to a text without tokens;
the other two take floor(k L') = 0 tokens of a short text, whose mean is not a number. ``compat``
gives open-unlearning's form, except that a text without tokens has no value.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from delible.measure.scoring.seen import TextAttack
from delible.measure.scoring.text import content_log_probabilities
from delible.registry import register
from delible.system.asks import TokenScores


def min_k(scores: TokenScores, share: float = 0.4, compat: bool = False) -> float | None:
    """Mean loss of the least likely tokens.

    Args:
        scores: Teacher-forced values at the text's tokens, shape [answer].
        share: Share of the tokens that count, in (0, 1]; at least one does.
        compat: Leave out the last token even when it is no end-of-turn token.

    Returns:
        Nats per token, in [0, inf); higher = less likely a member. ``None`` without tokens.
    """
    logprobs = np.sort(content_log_probabilities(scores, compat))
    if logprobs.size == 0:
        return None
    # The product is a little below a whole number at times (0.29 * 100): the code of the field
    # takes its floor all the same.
    return -float(logprobs[: max(1, math.floor(share * logprobs.size))].mean())


@register(
    kind="metric",
    name="min_k",
    title="Min-K",
    summary="Mean loss of the least likely tokens of a text or answer (40 % by default).",
    paper="2310.16789",
    year=2023,
    family="membership",
    capability="score",
    changes="nothing",
    range="[0, inf)",
    direction="High: the text looks as if the model was never trained on it.",
    misleads="Says little alone: rare names are unlikely whether seen or not. Compare members with "
    "non-members of the same kind and time (metric 'membership').",
    badges=("parity",),
)
class MinK(TextAttack):
    """Min-K score of a passage, or of an answer after its question."""

    share: float = Field(0.4, gt=0, le=1, description="Share of the tokens that count (k).")
    compat: bool = Field(False, description="Leave out the last token even when it is no end.")

    def value(self, scores: TokenScores, text: str) -> float | None:
        return min_k(scores, self.share, self.compat)
