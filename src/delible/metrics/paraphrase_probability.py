"""Paraphrase probability: how likely is the same fact in other words.

    P = exp( mean_j (1/L_j) sum_t log p(y'_jt | x, y'_j<t) )   over paraphrased answers y'_j

A fact that is forgotten should be unlikely in every form; unlearning often lowers only the form
that it trained on. Reference code: locuslab/open-unlearning (arXiv 2506.12618). Paraphrased
*questions* are a prompt attack, which works with every metric, and so are not part of this one.
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


@register(
    kind="metric",
    name="paraphrase_probability",
    title="Paraphrase probability",
    summary="Length-normalised probability of paraphrased answers (geometric mean over them).",
    paper="2506.12618",
    year=2025,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model finds the fact likely in other words, so it still knows it.",
    misleads="Paraphrases in a style foreign to the model are unlikely whether it knows the fact "
    "or not: compare with the original model, never read the value alone.",
    badges=("parity",),
)
class ParaphraseProbability(ItemMetric):
    """Probability per token of the record's paraphrased answers."""

    def prompt(self, record: RecordBase) -> Prompt | None:
        return ask(record) if isinstance(record, QA) else None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        texts = record.paraphrased_answers if isinstance(record, QA) else ()
        return [Score(prompt, text) for text in texts]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no paraphrased answers")
        mean = mean_over_answers([answers[request] for request in asked])
        if mean is None:
            return Item(None, "a paraphrased answer has no tokens")
        return Item(math.exp(mean))
