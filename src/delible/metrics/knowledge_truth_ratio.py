"""Knowledge truth ratio: the right answer's share against wrong answers of the same form.

    P_right / (P_right + P_wrong + 1e-10)
    P_right = exp(mean over paraphrased answers of the mean token log-probability)
    P_wrong = exp(mean over perturbed answers of the mean token log-probability)

The truth ratio in a form that is bounded and grows with knowledge; of the metrics of OpenUnlearning
it separates best the models that know from those that do not. Without a paraphrased answer, P_right
is that of the answer itself. Paper: OpenUnlearning (arXiv 2506.12618); reference code:
locuslab/open-unlearning (truth_ratio with the aggregator ``prob_mean``). Deviations: none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import mean_over_answers
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt, Request, Score
from delible.system.questions import ask

EPSILON = 1e-10


def knowledge_truth_ratio(right: float, wrong: float) -> float:
    """Share of the right answer, from mean log-probabilities.

    Args:
        right: Mean log-probability per token of the right answer(s), nats, in [-inf, 0].
        wrong: The same of the wrong answers, averaged over them.

    Returns:
        A value in [0, 1): 0.5 = right and wrong are equally likely.
    """
    return math.exp(right) / (math.exp(right) + math.exp(wrong) + EPSILON)


@register(
    kind="metric",
    name="knowledge_truth_ratio",
    title="Knowledge truth ratio",
    summary="Probability of the right answer divided by that of it and wrong ones of its form.",
    paper="2506.12618",
    year=2025,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1)",
    direction="High: the model prefers the truth, so it still knows it; 0.5: it cannot tell.",
    misleads="0.5 is also what a model gives that finds both likely. A destroyed model, for which "
    "every answer is all but impossible, gets 0: compare with a model that never knew.",
    badges=("parity",),
)
class KnowledgeTruthRatio(ItemMetric):
    """Preference for the right answer of a record that has perturbed answers."""

    def prompt(self, record: RecordBase) -> Prompt | None:
        return ask(record) if isinstance(record, QA) else None

    def _texts(self, record: RecordBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Right and wrong answers; none where there is no wrong one."""
        if not isinstance(record, QA) or not record.perturbed:
            return (), ()
        return record.paraphrased_answers or (record.answer,), record.perturbed

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        right, wrong = self._texts(record)
        return [Score(prompt, text) for text in (*right, *wrong)]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        means = [
            mean_over_answers([answers[Score(prompt, text)] for text in texts])
            for texts in self._texts(record)
        ]
        if not any(self._texts(record)):
            return Item(None, "the record has no perturbed answers")
        if means[0] is None or means[1] is None:
            return Item(None, "an answer has no tokens")
        return Item(knowledge_truth_ratio(means[0], means[1]))
