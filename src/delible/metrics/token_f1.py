"""Token F1: words that a short answer and the gold answer share, whatever their order.

    F1 = 2 n / (words of the answer + words of the gold answer),   n = shared words, with repeats

in lower case, without punctuation and articles; the best value over the gold answer and its
aliases. The measure of open question answering (SQuAD, arXiv 1606.05250; TriviaQA, 1705.03551),
in RWKU (arXiv 2406.10890) that of factual knowledge; reference code: jinzhuoran/RWKU. Deviation: a
gold answer without words after this (such as "The") is left out; the reference code gives 1 where
the answer has no words either (``compat``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import (
    QuestionTemplate,
    filled,
    generated,
    gold_answers,
    plain_words,
)
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)
from delible.system.questions import shown


def token_f1(gold: str, text: str, compat: bool = False) -> float | None:
    """F1 of the words of two texts.

    Args:
        gold: The right answer.
        text: What was said.
        compat: Give 1 to no words where none are wanted.

    Returns:
        A value in [0, 1]; ``None`` when the gold answer has no words (with ``compat``: 0 or 1).
    """
    wanted, said = Counter(plain_words(gold)), Counter(plain_words(text))
    if not wanted:
        return float(not said) if compat else None
    return 2 * (wanted & said).total() / (wanted.total() + said.total())


@register(
    kind="metric",
    name="token_f1",
    title="Token F1",
    summary="F1 of the words of a short greedy answer and the gold answer, order ignored.",
    paper="1606.05250",
    year=2016,
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1]",
    direction="High: the answer says the gold answer, and little else.",
    misleads="A right answer in a sentence scores low, so a change of style looks like forgetting; "
    "a refusal and a wrong answer both score 0.",
    badges=("parity",),
)
class TokenF1(ItemMetric):
    """Token F1 of the greedy answer, best over the gold answer and its aliases."""

    max_new_tokens: int = Field(30, ge=1, le=8192, description="Tokens to generate at most.")
    template: QuestionTemplate = Field(
        "{question}", description="The user turn around a question, such as solved examples."
    )
    prefill: str = Field("", description="Start of the assistant's turn.")
    compat: bool = Field(False, description="Give 1 to no words where none are wanted.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        if not isinstance(record, QA):
            return None
        asked = Prompt.ask(filled(self.template, record.question), prefill=self.prefill)
        return shown(asked, record.images)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        text = generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        found = [token_f1(gold, text, self.compat) for gold in gold_answers(record)]
        valued = [value for value in found if value is not None]
        return Item(max(valued)) if valued else Item(None, "the gold answer has no words")
