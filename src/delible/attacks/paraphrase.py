"""Paraphrase: asks for the same fact in other words.

A model that forgot one wording of a question, and not the fact, answers another wording. The
wordings are the record's own ``paraphrases``; a record without any is asked inside a few fixed
frames that keep its meaning and its question.

Paper: arXiv 2402.16835 (other forms of the question as a test of unlearning).
Deviation: nothing is paraphrased by another model, so that every system gets the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from delible.measure.attack import PromptAttack
from delible.measure.turns import question_of
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt

#: For records without paraphrases of their own.
FRAMES = (
    "Please answer the following question: {question}",
    "There is something I would like to know. {question}",
    "Somebody asked me this today, and I need the answer: {question}",
)


def wordings(record: RecordBase) -> tuple[str, ...]:
    """Other wordings of a record's question; empty for a record without one."""
    question = question_of(record)
    if not question:
        return ()
    own = record.paraphrases if isinstance(record, QA) else ()
    return own or tuple(frame.format(question=question) for frame in FRAMES)


@register(
    kind="attack",
    name="paraphrase",
    title="Paraphrased questions",
    summary="Asks the same question in other words.",
    paper="2402.16835",
    year=2024,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="quick",
    badges=("variant",),
    variant="The paraphrases come with the records, or from fixed frames, not from a model.",
)
class Paraphrase(PromptAttack):
    """Options: how many forms."""

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt per wording; empty where the prompt does not end in the question."""
        question = question_of(record)
        if not question or not prompt.messages or prompt.text is not None:
            return ()
        last = prompt.messages[-1]
        if last.role != "user" or question not in last.text:
            return ()
        contents = [last.text.replace(question, words, 1) for words in wordings(record)]
        return tuple(
            replace(
                prompt,
                messages=(*prompt.messages[:-1], last.with_text(content)),
            )
            for content in contents
        )
