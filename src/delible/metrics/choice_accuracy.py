"""Choice accuracy: does the model pick the right option of a multiple-choice question?

    letter:  argmax over letters of log P(letter | question and options)
    cloze:   argmax over options of log P(option | question) / length of the option

With cyclic orders the question is asked once for every rotation of its options, so that a model
that always says the same letter gets 1/options. Papers: WMDP (arXiv 2403.03218), MMLU (2009.03300);
rotations: full-stack evaluation (2510.07626). Reference code: EleutherAI/lm-evaluation-harness
(tasks wmdp, mmlu: the letter form, plain style). Deviations: the default is a chat turn instead of
plain text; the cloze form divides by tokens by default (the harness by bytes).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.choices import (
    Orders,
    Style,
    all_orders,
    letter_prompt,
    letter_scores,
    most_likely,
    text_log_probability,
)
from delible.measure.scoring.text import content_log_probabilities, continuing, token_scores
from delible.records import Choice, RecordBase
from delible.registry import register
from delible.system.asks import Prompt, Request, Score
from delible.system.questions import LETTERS, shown

Length = Literal["tokens", "bytes", "one"]


@register(
    kind="metric",
    name="choice_accuracy",
    title="Choice accuracy",
    summary="Share of multiple-choice questions whose right option is the likeliest.",
    paper="2403.03218",
    year=2024,
    family="outcome",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the right option is picked; 1 / number of options is chance.",
    misleads="A model that lost the form (one constant letter, little probability on letters: see "
    "letter_mass) is at chance although it still says the fact when asked openly. Far below "
    "chance is a sign of damage, not of better forgetting.",
    badges=("parity",),
)
class ChoiceAccuracy(ItemMetric):
    """1.0 for the right option, else 0.0; with cyclic orders the share of orders that are right,
    or 1.0 only if all are. ``detail`` has the letters that were picked, in the question's order.
    """

    form: Literal["letter", "cloze"] = Field("letter", description="Score letters, or the options.")
    style: Style = Field("chat", description="A chat turn, or plain text ending in 'Answer:'.")
    description: str = Field("", description="First line of the plain form.")
    orders: Orders = Field("given", description="Options as given, or in every cyclic order.")
    all_right: bool = Field(False, description="Count a question only if all orders are right.")
    length: Length = Field(
        "tokens", description="What the cloze form divides by: tokens, bytes, or one (nothing)."
    )

    @model_validator(mode="after")
    def _orders_need_letters(self) -> Self:
        if self.form == "cloze" and self.orders == "cyclic":
            raise ValueError("the cloze form does not show the options, so they have no order")
        return self

    def prompt(self, record: RecordBase) -> Prompt | None:
        if not isinstance(record, Choice):
            return None
        found = self._asked(record)
        if not record.images:
            return found
        # a raw text has no place for a picture
        return None if found.text is not None else shown(found, record.images)

    def _asked(self, record: Choice) -> Prompt:
        if self.form == "letter":
            return letter_prompt(record, self.style, self.description)
        if self.style == "chat":
            return Prompt.ask(record.question)
        head = f"{self.description}\n\n" if self.description else ""
        return Prompt(text=f"{head}{record.question}\nAnswer:")

    def _rows(self, record: Choice, prompt: Prompt) -> list[tuple[list[Score], int]]:
        """Requests for the options, and the place of the right one, per order."""
        if self.form == "cloze":
            texts = [continuing(prompt, option) for option in record.options]
            return [([Score(prompt, text) for text in texts], record.correct)]
        return [
            (letter_scores(record, asked), correct)
            for asked, correct in all_orders(record, prompt, self.orders)
        ]

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        if not isinstance(record, Choice):
            return []
        return [request for row, _ in self._rows(record, prompt) for request in row]

    def _log(self, request: Score, option: str, answers: Answers) -> float:
        log = text_log_probability(answers[request])
        if self.form == "letter" or self.length == "one":
            return log
        if self.length == "bytes":
            return log / len(option.encode("utf-8"))
        return log / max(1, content_log_probabilities(token_scores(answers[request])).size)

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        if not isinstance(record, Choice):
            return Item(None, "the record has no options")
        rows = self._rows(record, prompt)
        if not rows:
            return Item(None, "the options are not in the prompt, so they cannot be moved")
        right, picked = [], []
        for row, correct in rows:
            logs = [
                self._log(request, option, answers)
                for request, option in zip(row, record.options, strict=True)
            ]
            place = most_likely(np.asarray(logs, np.float64))
            if place is None:
                return Item(None, "no option has a probability")
            right.append(place == correct)
            picked.append(LETTERS[place])
        value = float(all(right)) if self.all_right else float(np.mean(right))
        return Item(value, detail=" ".join(picked))
