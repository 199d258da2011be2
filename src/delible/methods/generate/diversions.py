"""Diversions: what the model itself says to each forget question when it is led to another subject.

    target ~ p( . | "written by somebody who knows nothing about the topic", question, diversion)

The targets are the role ``target``, row by row beside the forget records: fluent, off the subject,
and in the model's own words. The diversion (a sentence such as "let us turn to something pleasant")
begins the answer while it is drawn and is no part of the target.

Paper: arXiv 2410.02760 (its consistency rows). Reference: github.com/rohitgandikota/erasing-llm.
Deviations: drawn under the novice's prefix alone, where released code pushes away from the expert's
as well (guidance 3); the answer itself is left out of what the model continues, so that it is no
part of the row; continuations that tell it are dropped, counted and drawn again. Where none is
left, the diversion sentence is the target, and that is said.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import ClassVar

from pydantic import Field

from delible.generation import writing
from delible.generation.rows import answered, questions
from delible.prompts import read_lines
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.train.fitting import fits
from delible.train.losses import Role
from delible.train.rows import told
from delible.train.slots import Generate, SlotContext
from delible.world import filters

logger = logging.getLogger(__name__)

WHERE = "generate 'diversions'"
#: What a record is about that names no subject.
UNNAMED = "the subject of the question below"


def led_astray(record: QA, topic: str | None) -> Prompt:
    """The question behind a novice's prefix, its answer begun by a diversion."""
    random = Random(f"diversions/{record.digest}")
    prefix = random.choice(read_lines("elm_novice.txt"))
    asked = Prompt.ask(record.question, prefill=f"{random.choice(sentences())} ")
    return told(asked, prefix.replace("{topic}", topic or record.subject or UNNAMED))


def sentences() -> Sequence[str]:
    """Beginnings that lead away from a question."""
    return read_lines("elm_diversions.txt")


@register(
    kind="generate",
    name="diversions",
    title="Diverted continuations",
    summary="Lets the model itself continue each forget question on a pleasant other subject.",
    paper="2410.02760",
    year=2024,
    family="synthetic answers",
    needs=("forget", "weights"),
    changes="nothing",
    badges=("variant",),
    variant="No guidance away from an expert; continuations that tell the answer are dropped.",
)
class Diversions(Generate):
    """Options of diverted continuations."""

    topic: str | None = Field(
        None, description="What the novice does not know; default: each record's own subject."
    )
    attempts: int = Field(4, ge=1, description="Draws per question at most.")
    temperature: float = Field(1.0, gt=0, description="Of the draws.")
    max_new_tokens: int = Field(48, ge=1, description="Longest continuation in tokens.")

    makes: ClassVar[tuple[Role, ...]] = ("target",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        forget = questions(context.records["forget"], WHERE)
        counts: Counter[str] = Counter()

        def usable(index: int, reply: str, known: Sequence[str]) -> list[str]:
            record, text = forget[index], reply.strip()
            fault = None
            if not text:
                fault = "empty"
            elif filters.leaks(record, text):
                fault = "leak"
            elif not fits(context.lm.template, Prompt.ask(record.question), text):
                fault = "too long"
            counts.update([fault] if fault else [])
            return [] if fault else [text]

        made = writing.written(
            context.lm, forget, lambda index: led_astray(forget[index], self.topic), usable,
            wanted=1, attempts=self.attempts, counts=counts, stage=context.stage,
            decoding=Decoding(
                self.max_new_tokens, temperature=self.temperature, seed=context.seed
            ),
        )  # fmt: skip
        if without := sum(not texts for texts in made):
            logger.warning(
                f"{WHERE}: {without} of {len(forget)} questions have no usable continuation "
                f"({filters.told(counts)}); a diversion sentence is their target."
            )
        targets: list[RecordBase] = []
        for record, texts in zip(forget, made, strict=True):
            random = Random(f"diversions/{context.seed}/{record.digest}")
            text = texts[0] if texts else random.choice(sentences()).rstrip(":") + "."
            targets.append(answered(record, text, "diversion"))
        return {"forget": list(forget), "target": targets}
