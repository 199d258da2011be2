"""Inverted facts: several fluent answers per forget question that contradict the true one.

    {a_1, ..., a_N} = generator(question, answer),   one forget row per pair (question, a_i)

Each forget record is repeated once per inverted answer; the answers are the role ``alternate``,
row by row beside the repeated records. Kept are answers that do not tell the true answer's facts,
are no refusals, no doubles, and of about its length.

Paper: arXiv 2409.11844. Reference: github.com/Carol-gutianle/MEOW (data/invert.py).
Deviations: the released code keeps every line of the reply; here what leaks, repeats or refuses
is dropped and counted, and asked for again. Without a generator model, answers come from
templates: the record's own wrong answers, those of other records, exchanged names and numbers.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from delible.generation import writing
from delible.generation.answers import other_answers
from delible.generation.rows import partners, questions
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Decoding
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext

WHERE = "generate 'inverted_facts'"


@register(
    kind="generate",
    name="inverted_facts",
    title="Inverted facts",
    summary="Makes several false but fluent answers to each forget question.",
    paper="2409.11844",
    year=2024,
    family="synthetic answers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="Leaks, refusals and doubles are dropped; templates write without a generator model.",
)
class InvertedFacts(Generate):
    """Options of inverted facts."""

    count: int = Field(4, ge=1, le=64, description="Inverted answers per question.")
    minimum: int = Field(1, ge=1, description="Fewest usable answers that a question may have.")
    attempts: int = Field(3, ge=1, description="How often the generator model is asked at most.")
    temperature: float = Field(0.9, ge=0, description="Of the generator model; 0 is greedy.")
    max_new_tokens: int = Field(512, ge=1, description="Longest reply of the generator model.")

    makes: ClassVar[tuple[Role, ...]] = ("alternate",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        forget = questions(context.records["forget"], WHERE)

        def prompt(record: QA) -> str:
            asked = {"question": record.question, "answer": record.answer}
            return writing.filled("generate_inverted_facts.txt", count=self.count, **asked)

        made = other_answers(
            context, forget, prompt, writing.read_list, name="inverted_facts",
            what="inverted answers", where=WHERE, count=self.count, minimum=self.minimum,
            attempts=self.attempts,
            decoding=Decoding(
                self.max_new_tokens, temperature=self.temperature, seed=context.seed
            ),
        )  # fmt: skip
        return partners(forget, made, "alternate", "inverted")
