"""Gradient norm: a text that was learned pulls less on the weights.

    score = mean over parameter tensors of || d/dw mean_t -log p(y_t | x, y_<t) ||

one text at a time, the end-of-turn token left out. A larger score means: less likely a member.
Paper: OpenUnlearning (arXiv 2506.12618); reference code: locuslab/open-unlearning. Deviation: a
tied embedding is one tensor (as in the reference); dropout is off, where the reference switches
the model to training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import gold_answers
from delible.records import Choice, RecordBase
from delible.registry import register
from delible.system.asks import GradientNorm, Prompt, Request
from delible.system.questions import ask

ORDERS = {"1": 1.0, "2": 2.0, "inf": float("inf")}


@register(
    kind="metric",
    name="gradient_norm",
    title="Gradient norm",
    summary="How hard a text pulls on the weights: the norm of its loss's gradient.",
    paper="2506.12618",
    year=2025,
    family="membership",
    capability="weights",
    changes="nothing",
    range="[0, inf)",
    direction="High: the text looks as if the model was never trained on it.",
    misleads="Says little alone: compare members with non-members of the same kind and time "
    "(metric 'membership'). Costs a backward pass per text. After ascent the norm is high for "
    "the forgotten texts, which marks them.",
    badges=("parity",),
)
class GradientNormAttack(ItemMetric):
    """Gradient norm of a passage, or of an answer after its question."""

    order: Literal["1", "2", "inf"] = Field("2", description="Order of the norm.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        return None if isinstance(record, Choice) else ask(record)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        golds = gold_answers(record)[:1]
        return [GradientNorm(prompt, gold, ORDERS[self.order]) for gold in golds]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        asked = list(self.requests(record, prompt))
        if not asked:
            return Item(None, "the record has no answer")
        return Item(float(np.asarray(answers[asked[0]]).reshape(-1)[0]))
