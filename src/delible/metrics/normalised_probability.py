"""Normalised probability: the gold answer's share against wrong answers of the same form.

    P(y) / ( P(y) + sum_j P(y~_j) + 1e-10 ),   P = exp(mean token log-probability)

Used for records that nobody trained on (general knowledge), where the plain probability says more
about style than about knowledge. Paper: TOFU (arXiv 2401.06121); reference code:
locuslab/open-unlearning.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import mean_log_probability, token_scores
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt, Request, Score
from delible.system.questions import ask

EPSILON = 1e-10


def normalised_probability(right: float, wrong: npt.NDArray[np.float64]) -> float:
    """Share of the right answer.

    Args:
        right: P of the gold answer, in [0, 1].
        wrong: P of each wrong answer, shape [wrong answers].

    Returns:
        A value in [0, 1]; higher = the right answer is preferred.
    """
    return float(right / (right + wrong.sum() + EPSILON))


@register(
    kind="metric",
    name="normalised_probability",
    title="Normalised probability",
    summary="Probability of the gold answer divided by that of it and all wrong answers.",
    paper="2401.06121",
    year=2024,
    family="utility",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model prefers the right answer; 1 / (1 + number of wrong answers) is "
    "chance.",
    misleads="Chance depends on the number of wrong answers; 0 when the model finds every answer "
    "all but impossible, whatever it prefers.",
    badges=("parity",),
)
class NormalisedProbability(ItemMetric):
    """Preference for the gold answer over the record's perturbed answers."""

    def prompt(self, record: RecordBase) -> Prompt | None:
        return ask(record) if isinstance(record, QA) else None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        if not isinstance(record, QA) or not record.perturbed:
            return []
        return [Score(prompt, text) for text in (record.answer, *record.perturbed)]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no perturbed answers")
        means = [mean_log_probability(token_scores(answers[request])) for request in asked]
        if any(mean is None for mean in means):
            return Item(None, "an answer has no tokens")
        right, *wrong = np.exp(np.asarray(means, np.float64))
        return Item(normalised_probability(float(right), np.asarray(wrong, np.float64)))
