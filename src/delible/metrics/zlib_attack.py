"""zlib attack: the loss of a text, set against how well it compresses.

    score = -(1/L) sum_t log p(y_t | x, y_<t) / len(zlib(y))     (end-of-turn token counted)

A repetitive text has a low loss without having been seen, and few compressed bytes. A larger score
means: less likely a member. Paper: Carlini et al. 2021 (arXiv 2012.07805); reference code:
locuslab/open-unlearning, jinzhuoran/RWKU, swj0419/muse_bench. Deviation: the whole text is
compressed, also where it was too long for the model and only its start was scored.
"""

from __future__ import annotations

import zlib

from delible.measure.scoring.seen import TextAttack
from delible.measure.scoring.text import mean_log_probability
from delible.registry import register
from delible.system.asks import TokenScores


def zlib_attack(scores: TokenScores, text: str) -> float | None:
    """Mean loss per token divided by the compressed size; ``None`` without answer tokens.

    Args:
        scores: Teacher-forced values at the text's tokens, shape [answer].
        text: The text itself; its UTF-8 bytes are compressed.

    Returns:
        Nats per byte, in [0, inf); higher = less likely a member.
    """
    mean = mean_log_probability(scores)
    return None if mean is None else -mean / len(zlib.compress(text.encode("utf-8")))


@register(
    kind="metric",
    name="zlib_attack",
    title="zlib attack",
    summary="Mean token loss of a text or answer divided by its size after zlib compression.",
    paper="2012.07805",
    year=2021,
    family="membership",
    capability="score",
    changes="nothing",
    range="[0, inf)",
    direction="High: the text looks as if the model was never trained on it.",
    misleads="The compressed size grows with the length, the mean loss does not: texts of unlike "
    "length are ranked by length. Short answers are mostly zlib's header.",
    badges=("parity",),
)
class ZlibAttack(TextAttack):
    """Loss per compressed byte of a passage, or of an answer after its question."""

    def value(self, scores: TokenScores, text: str) -> float | None:
        return zlib_attack(scores, text)
