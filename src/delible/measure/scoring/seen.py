"""What membership attacks on one text share: which texts, and their scores. No metric lives here.

A larger value always means: less likely a text that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import gold_answers, token_scores
from delible.records import Choice, RecordBase
from delible.system.asks import (
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.system.questions import ask


class TextAttack(ItemMetric):
    """An attack that reads the token scores of a passage, or of an answer after its question."""

    #: Whether the vocabulary's moments are read too.
    moments: ClassVar[bool] = False

    def value(self, scores: TokenScores, text: str) -> float | None:
        """The attack's value; ``None`` without tokens."""
        raise NotImplementedError

    def prompt(self, record: RecordBase) -> Prompt | None:
        # The letter of a multiple-choice question is no text that anybody memorised.
        return None if isinstance(record, Choice) else ask(record)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Score(prompt, gold, self.moments) for gold in gold_answers(record)[:1]]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no answer")
        value = self.value(token_scores(answers[asked[0]]), gold_answers(record)[0])
        return Item(value, "the answer has no tokens" if value is None else None)
