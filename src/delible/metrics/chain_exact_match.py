r"""Exact match after a chain of thought: is what follows "the answer is" the gold answer?

The answer is what stands between "the answer is" and the next period, else everything that was
said; both sides are compared in lower case without punctuation and articles. The measure of
BIG-Bench Hard (arXiv 2210.09261), in RWKU (arXiv 2406.10890) that of reasoning; reference code:
jinzhuoran/RWKU. Deviations: that code compares with every *character* of a gold answer instead of
with the answer, so that "False" never matches and "(B)" does; it takes the "A" of option (A) for
an article, so that (A) equals an empty answer; and it ends an answer at a decimal point. Here the
whole answer is compared, articles are kept where nothing else is left, and a period before a digit
is no end. ``compat`` gives the reference's form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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

NO_ANSWER = "NOANSWER"
_ANSWER = re.compile(r"[tT]he answer is (.*?)\.(?!\d)")
_COMPAT_ANSWER = re.compile(r"[tT]he answer is (.*?)\.")


def final_answer(text: str, compat: bool = False) -> str:
    """What a chain of thought ends with; NOANSWER when it says nothing."""
    found = (_COMPAT_ANSWER if compat else _ANSWER).search(text)
    return (found.group(1) if found else text).strip() or NO_ANSWER


def is_exact_match(golds: Sequence[str], text: str, compat: bool = False) -> bool:
    """Whether a chain of thought ends with one of the gold answers.

    Args:
        golds: Right answers.
        text: The whole chain of thought.
        compat: Compare with each character of the right answers, articles always left out.
    """
    said = final_answer(text, compat)
    if compat:
        return any(plain_words(said) == plain_words(char) for gold in golds for char in gold)

    def form(answer: str) -> list[str]:
        return plain_words(answer) or plain_words(answer, articles=True)

    return any(form(said) == form(gold) for gold in golds)


@register(
    kind="metric",
    name="chain_exact_match",
    title="Exact match after reasoning",
    summary="Whether what follows 'the answer is' in a chain of thought is the gold answer.",
    paper="2210.09261",
    year=2022,
    family="utility",
    capability="generate",
    changes="nothing",
    range="0 or 1",
    direction="1: the chain of thought ends with the right answer.",
    misleads="Needs the form: a right answer after other words, or cut off at the token limit, "
    "counts as wrong, so a lost habit looks like lost reasoning. Two-way questions are right half "
    "of the time by chance.",
    badges=("parity",),
)
class ChainExactMatch(ItemMetric):
    """1.0 for a chain of thought that ends with the gold answer, else 0.0."""

    max_new_tokens: int = Field(256, ge=1, le=8192, description="Tokens to generate at most.")
    template: QuestionTemplate = Field(
        "{question}\nThink step by step, and end with 'So the answer is ANSWER.'",
        description="The user turn around a question, such as solved examples.",
    )
    prefill: str = Field("", description="Start of the assistant's turn.")
    compat: bool = Field(False, description="Compare with single characters, as the paper's code.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        if not isinstance(record, QA):
            return None
        asked = Prompt.ask(filled(self.template, record.question), prefill=self.prefill)
        return shown(asked, record.images)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        text = generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        return Item(float(is_exact_match(gold_answers(record), text, self.compat)))
