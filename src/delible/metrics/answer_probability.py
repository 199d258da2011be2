"""Answer probability: how likely is the gold answer, per token.

    P(y | x) = exp( (1/L) sum_t log p(y_t | x, y_<t) )

the L-th root of the answer's probability, end-of-turn token counted. Paper: TOFU
(arXiv 2401.06121); reference code: locuslab/tofu, locuslab/open-unlearning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import gold_answers, mean_log_probability, token_scores
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import (
    Prompt,
    Request,
    Score,
    TokenScores,
)


def answer_probability(scores: TokenScores) -> float | None:
    """exp of the mean token log-probability; ``None`` without answer tokens.

    Args:
        scores: Teacher-forced values at the answer's tokens, shape [answer].

    Returns:
        A value in [0, 1]; higher = the answer is more likely.
    """
    mean = mean_log_probability(scores)
    return None if mean is None else math.exp(mean)


@register(
    kind="metric",
    name="answer_probability",
    title="Answer probability",
    summary="Length-normalised probability of the gold answer after the question.",
    paper="2401.06121",
    year=2024,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model finds the gold answer likely, so it still knows it.",
    misleads="Falls when only the wording moves (another template, a refusal habit) although the "
    "fact is intact; long answers are dominated by words that carry no fact.",
    badges=("parity",),
)
class AnswerProbability(ItemMetric):
    """Probability of the gold answer per token; aliases are not asked."""

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Score(prompt, gold) for gold in gold_answers(record)[:1]]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no answer")
        value = answer_probability(token_scores(answers[asked[0]]))
        return Item(value, "the answer has no tokens" if value is None else None)
