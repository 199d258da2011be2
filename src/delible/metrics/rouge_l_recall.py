"""ROUGE-L recall: how much of the gold answer does the greedy answer say, in order.

    recall = LCS(gold words, answer words) / number of gold words

with Porter stemming; the best value over the gold answer and its aliases. Paper: TOFU
(arXiv 2401.06121); reference code: locuslab/tofu, locuslab/open-unlearning (which has no aliases
and generates 200 tokens).
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import generated, gold_answers, rouge_l_recall
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
    name="rouge_l_recall",
    title="ROUGE-L recall",
    summary="Share of the gold answer's words that the greedy answer has, in the same order.",
    paper="2401.06121",
    year=2024,
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1]",
    direction="High: the answer says what the gold answer says.",
    misleads="A wrong answer of the same form scores high (names are few of the words); recall "
    "does not punish rambling; words outside a-z and 0-9 are invisible.",
    badges=("parity",),
)
class RougeLRecall(ItemMetric):
    """ROUGE-L recall of the greedy answer against the gold answer and its aliases."""

    max_new_tokens: int = Field(64, ge=1, le=8192, description="Tokens to generate at most.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        # A letter (Choice) and a text without a question (Passage) have no answer to recall.
        if isinstance(record, QA | Dialogue) and gold_answers(record):
            return ask(record)
        return None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        text = generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        value = rouge_l_recall(gold_answers(record), text)
        return Item(value, "ROUGE sees no word in the gold answer" if value is None else None)
