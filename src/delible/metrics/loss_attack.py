"""Loss attack: a text that a model was trained on has a lower loss than one that it never saw.

    score = -(1/L) sum_t log p(y_t | x, y_<t)        (end-of-turn token counted)

As for all membership attacks here, a larger score means: less likely a member. Paper: Yeom et al.
2018 (arXiv 1709.01604); for unlearning: MUSE (arXiv 2407.06460), RWKU (arXiv 2406.10890).
Reference code: locuslab/open-unlearning, jinzhuoran/RWKU, swj0419/muse_bench. Deviation: RWKU
stores the negative of it, the log-likelihood.
"""

from __future__ import annotations

from delible.measure.scoring.seen import TextAttack
from delible.measure.scoring.text import mean_log_probability
from delible.registry import register
from delible.system.asks import TokenScores


def loss_attack(scores: TokenScores) -> float | None:
    """Mean loss per token, in nats; ``None`` without answer tokens.

    Args:
        scores: Teacher-forced values at the answer's tokens, shape [answer].

    Returns:
        A value in [0, inf); higher = less likely a member.
    """
    mean = mean_log_probability(scores)
    return None if mean is None else -mean


@register(
    kind="metric",
    name="loss_attack",
    title="Loss attack",
    summary="Mean token loss of a text or answer: lower if the model was trained on it.",
    paper="1709.01604",
    year=2018,
    family="membership",
    capability="score",
    changes="nothing",
    range="[0, inf)",
    direction="High: the text looks as if the model was never trained on it.",
    misleads="Says little alone: easy texts have a low loss everywhere. Compare members with "
    "non-members of the same kind (metric 'membership') or with a reference model.",
    badges=("parity",),
)
class LossAttack(TextAttack):
    """Loss of a passage, or of an answer after its question."""

    def value(self, scores: TokenScores, text: str) -> float | None:
        return loss_attack(scores)
