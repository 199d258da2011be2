"""Form probability: how likely is the gold answer when a fact is asked in this form?

    P(y | x) = exp( (1/L) sum_t log p(y_t | x, y_<t) )

over the answer's own tokens (the end-of-turn token is not counted) after an answer cue. The form
follows from the record: a blank, a question, a choice (the letter), a statement (true or false),
or an answer that is spelled, one character a line. Paper: ORT (arXiv 2506.07795); reference code:
Acruxos/ORT. Deviations: instructions and the worked example of the spelled form are our own, and
every model gets the example; the cue of the spelled form ends with a line break.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.choices import option_lines
from delible.measure.scoring.text import (
    QuestionTemplate,
    content_log_probabilities,
    continuing,
    filled,
    token_scores,
)
from delible.records import QA, Choice, RecordBase
from delible.registry import register
from delible.system.asks import Prompt, Request, Score
from delible.system.questions import LETTERS, shown

BLANK = "___"
SPELLED, STATEMENT, CLOZE = "spelled", "statement", "cloze"


def spelled(answer: str) -> str:
    """An answer with one character on each line, without its spaces."""
    return "\n".join(char for char in answer if not char.isspace())


@register(
    kind="metric",
    name="form_probability",
    title="Probability in a form",
    summary="Probability of the gold answer per token in the form that the record has.",
    paper="2506.07795",
    year=2025,
    family="memorisation",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: the fact can still be got at in this form.",
    misleads="Forms have levels of their own (a letter is 0.25 by chance, a spelled answer is "
    "easy after its first characters): compare each form with the same form before unlearning.",
    badges=("parity",),
)
class FormProbability(ItemMetric):
    """Probability of the answer, or its share among the answers that are offered."""

    blank_template: QuestionTemplate = Field(
        "Which words are missing in this sentence?\n{question}\n",
        description="The user turn around a sentence with a blank.",
    )
    question_template: QuestionTemplate = Field(
        "Give a short answer.\nQuestion: {question}\n", description="The user turn of a question."
    )
    choice_template: QuestionTemplate = Field(
        "Choose the right option. Reply with its letter and nothing else.\n{question}\n",
        description="The user turn around a question and its options.",
    )
    statement_template: QuestionTemplate = Field(
        "Is this statement true or false? Reply with one word.\n{question}\n",
        description="The user turn around a statement.",
    )
    spelled_template: QuestionTemplate = Field(
        "Answer letter by letter: one character on each line, and no spaces.\n"
        "Question: What is the capital of Peru?\nAnswer:\nL\ni\nm\na\n\nQuestion: {question}\n",
        description="The user turn of a question whose answer is spelled.",
    )
    prefill: str = Field("Answer:", description="Start of the assistant's turn.")
    share: bool = Field(
        False,
        description="Divide by the sum over all offered answers: the letters, the wrong ones.",
    )

    def prompt(self, record: RecordBase) -> Prompt | None:
        if isinstance(record, Choice):
            question = f"{record.question}\n{option_lines(record.options)}"
            asked = Prompt.ask(filled(self.choice_template, question), prefill=self.prefill)
            return shown(asked, record.images)
        if not isinstance(record, QA):
            return None
        if record.group == SPELLED:
            spelled = filled(self.spelled_template, record.question)
            return shown(Prompt.ask(spelled, prefill=f"{self.prefill}\n"), record.images)
        template = self.question_template
        if record.group == STATEMENT:
            template = self.statement_template
        elif record.group == CLOZE or BLANK in record.question:
            template = self.blank_template
        asked = Prompt.ask(filled(template, record.question), prefill=self.prefill)
        return shown(asked, record.images)

    def _answers(self, record: RecordBase) -> list[str]:
        """The gold answer and, for a share, what else is offered."""
        if isinstance(record, Choice):
            gold = LETTERS[record.correct]
            letters = LETTERS[: len(record.options)].replace(gold, "")
            return [gold, *letters] if self.share else [gold]
        if not isinstance(record, QA):
            return []
        offered = [record.answer, *(record.perturbed if self.share else ())]
        return [spelled(text) for text in offered] if record.group == SPELLED else offered

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Score(prompt, continuing(prompt, text)) for text in self._answers(record)]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        rows = [
            content_log_probabilities(token_scores(answers[request]))
            for request in self.requests(record, prompt)
        ]
        if not rows or not all(row.size for row in rows):
            return Item(None, "an answer has no tokens" if rows else "the record has no answer")
        if self.share and len(rows) == 1:
            return Item(None, "the record offers one answer only")
        gold, *others = (math.exp(row.mean()) for row in rows)
        if not self.share:
            return Item(gold)
        total = gold + sum(others)
        return Item(gold / total) if total else Item(None, "no answer has a probability")
