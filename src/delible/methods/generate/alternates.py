"""Alternates: other plausible answers to each forget question, drawn one by one.

    a_k ~ p( . | question, answer, "another answer with different details"),   k = 1 ... 5

Each forget record is repeated once per alternate; the alternates are the role ``alternate``, row
by row beside the repeated records. In the paper the model that is to forget writes them itself
(``--generator self``), so that they sound like it.

Paper: arXiv 2409.13474. Reference: github.com/molereddy/Alternate-Preference-Optimization,
github.com/locuslab/open-unlearning (community/methods/AltPO).
Deviations: the released code keeps every draw; here an alternate that tells the true facts, is a
refusal or repeats another one is dropped, counted and drawn again. Without a generator model,
templates write them.
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

WHERE = "generate 'alternates'"
#: Where a reply starts to make up another example.
STOPS = ("Question:", "\n\n")


@register(
    kind="generate",
    name="alternates",
    title="Alternate answers",
    summary="Draws other plausible answers to each forget question, by the model itself if asked.",
    paper="2409.13474",
    year=2024,
    family="synthetic answers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="Leaks, refusals and doubles are dropped; templates write without a generator model.",
)
class Alternates(Generate):
    """Options of alternates."""

    count: int = Field(5, ge=1, le=64, description="Alternates per question.")
    minimum: int = Field(1, ge=1, description="Fewest usable alternates that a question may have.")
    attempts: int = Field(10, ge=1, description="Draws per question at most.")
    temperature: float = Field(1.0, gt=0, description="Of the draws.")
    max_new_tokens: int = Field(200, ge=1, description="Longest alternate in tokens.")

    makes: ClassVar[tuple[Role, ...]] = ("alternate",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        forget = questions(context.records["forget"], WHERE)

        def prompt(record: QA) -> str:
            asked = {"question": record.question, "answer": record.answer}
            return writing.filled("generate_alternate.txt", **asked)

        made = other_answers(
            context, forget, prompt, lambda reply: [reply.strip()], name="alternates",
            what="alternates", where=WHERE, count=self.count, minimum=self.minimum,
            attempts=self.attempts,
            decoding=Decoding(self.max_new_tokens, STOPS, self.temperature, seed=context.seed),
        )  # fmt: skip
        return partners(forget, made, "alternate", "alternate")
