"""ROUGE-L F1: how alike are the greedy answer and the gold answer, in words and their order.

    recall = LCS / gold words,    precision = LCS / answer words,    F1 = their harmonic mean

the best value over the gold answer and its aliases. Unlike recall it punishes rambling. Lin 2004;
as a metric of unlearning: MUSE (arXiv 2407.06460), FIT (arXiv 2601.21682). Reference code:
locuslab/open-unlearning (with Porter stemming), XiaoyuXU1/FIT. Deviations: FIT leaves the prompt
in the text that it compares; here only what was generated counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import generated, gold_answers, rouge_l_f1
from delible.records import QA, Dialogue, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)
from delible.system.questions import ask


@register(
    kind="metric",
    name="rouge_l_f1",
    title="ROUGE-L F1",
    summary="Likeness of the greedy answer to the gold answer, in words and their order.",
    paper="2407.06460",
    year=2024,
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1]",
    direction="High: the answer says what the gold answer says, and little else.",
    misleads="A right answer in a long sentence scores low against a short gold answer; a wrong "
    "one of the same form scores high. Words outside a-z and 0-9 are invisible.",
    badges=("parity",),
)
class RougeLF1(ItemMetric):
    """ROUGE-L F1 of the greedy answer against the gold answer and its aliases."""

    max_new_tokens: int = Field(64, ge=1, le=8192, description="Tokens to generate at most.")
    stemmer: bool = Field(True, description="Compare word stems instead of words.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        if isinstance(record, QA | Dialogue) and gold_answers(record):
            return ask(record)
        return None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        text = generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        value = rouge_l_f1(gold_answers(record), text, self.stemmer)
        return Item(value, "ROUGE sees no word in the gold answer" if value is None else None)
