"""Truth ratio: how likely are wrong answers of the same form, next to the right one.

    TR = P_wrong / (P_right + 1e-10)
    P_right = exp(mean over paraphrased answers of the mean token log-probability)
    P_wrong = exp(mean over perturbed answers of the mean token log-probability)

Without a paraphrased answer, P_right is that of the answer itself. Paper: TOFU
(arXiv 2401.06121); reference code: locuslab/open-unlearning, locuslab/tofu. This geometric mean is
that of the leaderboard and of OpenUnlearning; the paper averages the probabilities themselves
(option ``mean: arithmetic``), which changes the p-values of forget quality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import mean_log_probability, mean_over_answers, token_scores
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import (
    Answer,
    Prompt,
    Request,
    Score,
)
from delible.system.questions import ask

EPSILON = 1e-10

Form = Literal["raw", "closer_to_one", "true_better"]
Mean = Literal["geometric", "arithmetic"]


def truth_ratio(right: float, wrong: float, form: Form = "raw") -> float:
    """The truth ratio from mean log-probabilities.

    Args:
        right: Mean log-probability per token of the right answer(s), nats, in [-inf, 0].
        wrong: The same of the wrong answers, averaged over them.
        form: ``"raw"``: TR in [0, 1e10]. ``"closer_to_one"``: min(TR, 1/TR) in [0, 1], 1 =
            right and wrong are equally likely (forget set). ``"true_better"``: max(0, 1 - TR)
            in [0, 1], high = the right answer is preferred (everything to be kept).
    """
    ratio = math.exp(wrong) / (math.exp(right) + EPSILON)
    if form == "closer_to_one":
        return min(ratio, 1 / ratio) if ratio > 0 else 0.0
    return max(0.0, 1 - ratio) if form == "true_better" else ratio


def log_mean(answers: Sequence[Answer], mean: Mean = "geometric") -> float | None:
    """Log of the mean of several answers' probabilities per token.

    Args:
        answers: Token scores of each answer.
        mean: ``"geometric"``: mean of the log-probabilities. ``"arithmetic"``: log of the mean
            of the probabilities, never smaller.

    Returns:
        Nats, in [-inf, 0]; ``None`` when there is no answer, or one of them has no tokens.
    """
    if mean == "geometric":
        return mean_over_answers(answers)
    means = [mean_log_probability(token_scores(answer)) for answer in answers]
    valued = np.asarray([value for value in means if value is not None], np.float64)
    if valued.size == 0 or valued.size < len(means):
        return None
    return float(np.logaddexp.reduce(valued)) - math.log(valued.size)


@register(
    kind="metric",
    name="truth_ratio",
    title="Truth ratio",
    summary="Probability of wrong answers of the same form divided by that of the right one.",
    paper="2401.06121",
    year=2024,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="raw: [0, 1e10]; closer_to_one and true_better: [0, 1]",
    direction="raw: below 1 the model prefers the truth. closer_to_one: 1 = it cannot tell "
    "right from wrong, near 0 = it knows, or was driven to prefer the wrong. true_better: high = "
    "it prefers the truth.",
    misleads="The mean of raw ratios hangs on a few large ones. A destroyed model, for which "
    "every answer is all but impossible, gets 0: true_better then looks perfect.",
    badges=("parity",),
)
class TruthRatio(ItemMetric):
    """Truth ratio of a record that has perturbed answers.

    Keep the raw form for ``forget_quality`` and ``model_utility``, which need it.
    """

    form: Form = Field("raw", description="raw, closer_to_one (forget) or true_better (keep).")
    mean: Mean = Field(
        "geometric", description="Mean over several answers: geometric, or the paper's arithmetic."
    )

    def prompt(self, record: RecordBase) -> Prompt | None:
        return ask(record) if isinstance(record, QA) else None

    def _right(self, record: RecordBase, prompt: Prompt) -> list[Score]:
        if not isinstance(record, QA) or not record.perturbed:
            return []
        return [Score(prompt, text) for text in record.paraphrased_answers or (record.answer,)]

    def _wrong(self, record: RecordBase, prompt: Prompt) -> list[Score]:
        perturbed = record.perturbed if isinstance(record, QA) else ()
        return [Score(prompt, text) for text in perturbed]

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [*self._right(record, prompt), *self._wrong(record, prompt)]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        if not isinstance(record, QA) or not record.perturbed:
            return Item(None, "the record has no perturbed answers")
        right, wrong = (
            log_mean([answers[request] for request in requests], self.mean)
            for requests in (self._right(record, prompt), self._wrong(record, prompt))
        )
        if right is None or wrong is None:
            return Item(None, "an answer has no tokens")
        return Item(truth_ratio(right, wrong, self.form))
