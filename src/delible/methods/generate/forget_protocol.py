"""Forget protocol: rows that teach "what stands between the tags is unknown here".

    forget row   <<UNL>> u        <</UNL>>  question   ->   forgot
    retain row   <<UNL>> another  <</UNL>>  question   ->   the answer
    untagged                                question   ->   the answer

for each record that is given: u is its subject, or its answer. The rows are taught with
`objective: finetune` and `keep: nll`, mixed one to one, so that

    loss = - log p("forgot" | question, u) - log p(answer | question, another)

One such training covers targets that it never saw: who they are stands in the prompt (guard
`icku`). Records are only practised on; nothing about them is forgotten.

Paper: arXiv 2410.00382. Reference code: seele1917/test-time-in-context-unlearning.
Deviations: loss on the answer only (`span: all` trains the whole sequence, as the released code
does); untagged rows, so that a conversation without tags stays as it was; another item never is,
contains or is contained in what is asked about or answered; blocks of several items, as they occur
when there are several targets (`items: 1` is the paper's).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from delible.errors import DataError
from delible.generation.rows import answered, questions
from delible.lm.lm import LM
from delible.lm.new_tokens import add_tokens
from delible.records import QA, Passage, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.tags import FORGOT, TAGS, neutralised, tagged
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext
from delible.world import filters

logger = logging.getLogger(__name__)

WHERE = "generate 'forget_protocol'"
Tag = Literal["subject", "answer"]


def item_of(record: QA, tag: Tag) -> str:
    """What is tagged when the record is to be unknown."""
    return record.answer if tag == "answer" else record.subject or ""


def other_items(record: QA, records: Sequence[QA], tag: Tag) -> list[str]:
    """What may be tagged while the record stays known, each once, in order.

    Args:
        records: All that are practised on; wrong answers of a record come before them.
    """
    own = list(record.perturbed) if tag == "answer" else []
    told = (record.question, record.answer, record.subject or "")
    found = dict.fromkeys([*own, *(item_of(one, tag) for one in records)])
    return [
        item
        for item in found
        if item.strip()
        and not any(filters.says(text, item) for text in told)
        and not filters.says(item, item_of(record, tag))
    ]


def block(own: Sequence[str], others: Sequence[str], most: int, draw: Random) -> list[str]:
    """Up to ``most`` items in random order: all of ``own``, and some others."""
    least = 0 if own else 1
    room = min(most - len(own), len(others))
    items = [*own, *draw.sample(list(others), draw.randint(min(least, room), room))]
    draw.shuffle(items)
    return items


@register(
    kind="generate",
    name="forget_protocol",
    title="Forget protocol",
    summary="Makes rows in which what is tagged in the prompt is answered with 'forgot'.",
    paper="2410.00382",
    year=2024,
    family="synthetic answers",
    needs=("forget",),
    changes="two new tokens",
    badges=("variant",),
    variant="Loss on answers only, untagged rows, several items in a block, distractors that "
    "overlap with the question or the answer are left out.",
)
class ForgetProtocol(Generate):
    """Options of the protocol's rows."""

    tag: Tag = Field(
        "subject",
        description="What is tagged: the record's subject, or (as for TOFU in the paper) its "
        "answer, which then stands in the prompt.",
    )
    items: int = Field(1, ge=1, le=64, description="Items in a block at most.")
    untagged: float = Field(1 / 3, ge=0, lt=1, description="Share of all rows without a block.")
    span: Literal["answer", "all"] = Field(
        "answer", description="What is learned: the answer, or the whole sequence with the prompt."
    )

    makes: ClassVar[tuple[Role, ...]] = ("retain",)

    def prepare(self, lm: LM) -> None:
        add_tokens(lm, TAGS)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        given = [*context.records["forget"], *context.records.get("retain", ())]
        records = [_cleaned(record) for record in questions(given, WHERE)]
        draw = Random(f"{context.seed}/forget_protocol")
        forget: list[QA] = []
        retain: list[QA] = []
        if not any(item_of(record, self.tag) for record in records):
            raise DataError(
                "no record names a subject that could be tagged.",
                where=WHERE,
                hint="Give them a 'subject', or tag answers (--tag answer).",
            )
        for number, record in enumerate(records, start=1):
            own = item_of(record, self.tag)
            others = other_items(record, records, self.tag)
            if not others:
                raise DataError(
                    f"for record {number} there is nothing else that could be tagged.",
                    where=WHERE,
                    hint="Give records about others, too.",
                )
            if own:
                forget.append(_asked(record, block([own], others, self.items, draw), FORGOT))
            kept = block([], others, self.items, draw)
            retain.append(_asked(record, kept, record.answer))
        if len(forget) < len(records):
            logger.info(
                f"{len(records) - len(forget)} of {len(records)} records name no subject: they are "
                "practised on as what is kept only."
            )
        plain = round(self.untagged / (1 - self.untagged) * 2 * len(records))
        while len(retain) < len(records) + plain:
            missing = len(records) + plain - len(retain)
            retain += draw.sample(records, min(missing, len(records)))
        if self.span == "all":
            lm = context.lm
            return {
                "forget": [_whole(lm, row) for row in forget],
                "retain": [_whole(lm, row) for row in retain],
            }
        return {"forget": list(forget), "retain": list(retain)}


def _cleaned(record: QA) -> QA:
    """The record without a tag of its own."""
    question, answer, subject = neutralised([record.question, record.answer, record.subject or ""])
    changed = {"question": question, "answer": answer, "subject": subject or None}
    return record.model_copy(update=changed)


def _asked(record: QA, items: Sequence[str], answer: str) -> QA:
    row = answered(record, answer, "protocol")
    return row.model_copy(update={"question": tagged(record.question, items)})


def _whole(lm: LM, row: QA) -> Passage:
    text = lm.template.render(Prompt.ask(row.question)) + row.answer + lm.template.end_of_turn[1]
    return Passage(text=text, subject=row.subject, group=row.group)
