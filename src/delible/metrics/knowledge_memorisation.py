"""Knowledge memorisation (MUSE's KnowMem): does the model answer questions on what it read?

    ROUGE-L F1( greedy answer of at most 32 tokens, gold answer )

asked as plain text after ten solved examples ("Question: ... Answer: ..."), so that base models
understand the form; the answer ends before a blank line or the next question. On the retain split
this is MUSE's utility (UtilPres). Paper: MUSE (arXiv 2407.06460); reference code:
swj0419/muse_bench (no stemming), also in locuslab/open-unlearning (stemming; option ``stemmer``).
Deviations: the benchmark's own examples must be given (``examples``); the built-in ones are general
knowledge. The prompt does not end in a space, which would split a word from its token
(``compat`` ends it so, as the reference code does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import (
    cut_before,
    generated,
    gold_answers,
    rouge_l_f1,
)
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)

#: Where an answer ends.
STOPS = ("\n\n", "\nQuestion", "Question:")

# Short, so that they fit into small contexts.
_BUILT_IN = (
    ("What do bees make?", "Honey"),
    ("Which metal is liquid?", "Mercury"),
    ("What has 88 keys?", "A piano"),
    ("What follows Monday?", "Tuesday"),
    ("What is 7 plus 5?", "12"),
    ("What do cows eat?", "Grass"),
    ("What pumps blood?", "The heart"),
    ("What is frozen water?", "Ice"),
    ("What barks?", "A dog"),
    ("What colour is snow?", "White"),
)
#: Ten pairs of general knowledge, for users without a benchmark's own.
EXAMPLES = tuple(QA(question=question, answer=answer) for question, answer in _BUILT_IN)


def few_shot_prompt(examples: Sequence[QA], question: str, compat: bool = False) -> str:
    """The examples, solved, and the question.

    Args:
        examples: Pairs to show; one that asks the same question is left out.
        question: What is asked.
        compat: End with a space after "Answer:".
    """
    shown = [
        f"Question: {example.question}\nAnswer: {example.answer}\n\n"
        for example in examples
        if example.question != question
    ]
    return "".join(shown) + f"Question: {question}\nAnswer:" + (" " if compat else "")


@register(
    kind="metric",
    name="knowledge_memorisation",
    title="Knowledge memorisation",
    summary="ROUGE-L F1 of short answers to questions on the text, asked after solved examples.",
    paper="2407.06460",
    year=2024,
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1]",
    direction="High: the model knows what the text says. On retained records: it is still useful.",
    misleads="Some questions can be answered without the text: compare with a model that never saw "
    "it. A refusal and a wrong answer both score 0. Words outside a-z and 0-9 are invisible.",
    badges=("parity",),
)
class KnowledgeMemorisation(ItemMetric):
    """ROUGE-L F1 of few-shot answers."""

    examples: tuple[QA, ...] = Field(
        EXAMPLES, description="Solved examples to show (question, answer); the benchmark's own."
    )
    max_new_tokens: int = Field(32, ge=1, le=8192, description="Tokens to generate at most.")
    stemmer: bool = Field(False, description="Compare word stems instead of words.")
    compat: bool = Field(False, description="End the prompt with a space.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        if not isinstance(record, QA):
            return None
        return Prompt(text=few_shot_prompt(self.examples, record.question, self.compat))

    def _request(self, prompt: Prompt) -> Generate:
        return Generate(prompt, Decoding(self.max_new_tokens, stop=STOPS))

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [self._request(prompt)]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        # Cut once more: an attack or a remote system may not know how to stop.
        text = cut_before(generated(answers[self._request(prompt)]), STOPS)
        value = rouge_l_f1(gold_answers(record), text, self.stemmer)
        return Item(value, "ROUGE sees no word in the gold answer" if value is None else None)
