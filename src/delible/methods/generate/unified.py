"""Unified rows: forgetting, its boundary, general use and lured answers, all as short questions.

    forget     the forget records as question-answer pairs
    prefilled  the same questions, answered "Sure! It is" + the true answer
    retain     anchors and neighbours, and general rows, as many of one as of the other

An anchor asks the same about another, permitted subject, so that both sides of the boundary are
met. Losses that are ``instructed`` learn from the start model under this generator's instruction,
which names the topic and says to decline inside and to answer outside of it. Questions at which
that teacher itself gives the answer away when lured are dropped: they would teach to leak.

Paper: arXiv 2604.15482 (no public code), after arXiv 2601.21283. Deviations: anchors are retain
records of the same group, passages become continuation questions, unless a generator model writes
them; doubles are found by their words, not by an encoder. The instruction stands at the head of
the user turn (some chat templates have no system turn).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from delible.errors import DataError, RecipeError
from delible.generation import writing
from delible.generation.rows import answered, question_of, questions
from delible.measure.engine import measure
from delible.names import Names
from delible.prompts import read_lines
from delible.records import QA, Passage, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.system.asks import Generate as Ask
from delible.system.base import System
from delible.train.losses import Role
from delible.train.rows import told
from delible.train.slots import Generate, SlotContext
from delible.world import filters

logger = logging.getLogger(__name__)

WHERE = "generate 'unified'"
#: Names that an instruction lists at most.
LISTED = 50
#: Tokens that a lured teacher may say.
TEACHER_TOKENS = 32
#: Tokens of a question or a short answer.
SHORT_TOKENS = 64
#: Forgotten names may occur as words of another text from this length on.
SHORTEST_NAME = 3


def shared_equally(one: Sequence[RecordBase], other: Sequence[RecordBase]) -> list[RecordBase]:
    """Both lists, the shorter one repeated to the length of the longer."""
    length = max(len(one), len(other))
    return [part[place % len(part)] for part in (one, other) if part for place in range(length)]


@register(
    kind="generate",
    name="unified",
    title="Unified question rows",
    summary="Rewrites all data as short questions, adds lured answers and boundary questions.",
    paper="2604.15482",
    year=2026,
    family="synthetic questions",
    needs=("forget",),
    changes="nothing",
    badges=("experimental", "variant"),
    variant="Offline, anchors and questions come from the records; doubles are found by words.",
)
class Unified(Generate):
    """Options of unified rows."""

    topic: str | None = Field(
        None, description="What the teacher must not know; default: the forgotten subjects' names."
    )
    questions_per_passage: int = Field(
        3, ge=1, description="Questions that a generator model writes about each passage."
    )
    leaking_rows: Literal["drop", "keep"] = Field(
        "drop", description="What becomes of questions at which the lured teacher leaks."
    )
    minimum_share: float = Field(
        0.5, ge=0, le=1, description="Share of the forget questions that must be left."
    )

    makes: ClassVar[tuple[Role, ...]] = ("prefilled",)

    def instruction(self, context: SlotContext) -> str | None:
        return writing.filled("teacher_instruction.txt", topic=self._topic(context))

    def _topic(self, context: SlotContext) -> str:
        if self.topic is not None:
            return self.topic
        names = list(dict.fromkeys(one.subject for one in context.records["forget"] if one.subject))
        if not names:
            raise RecipeError(
                "nobody says what the teacher must not know: no forget record has a subject.",
                where=WHERE,
                hint="Add --topic 'what is to be forgotten', or subjects to the records.",
            )
        if len(names) > LISTED:
            raise RecipeError(
                f"the teacher's instruction cannot list {len(names)} names ({LISTED} at most).",
                where=WHERE,
                hint="Add --topic with one phrase for all of them.",
            )
        return ", ".join(names)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        counts: Counter[str] = Counter()
        forget = self._questions(context, context.records["forget"], counts)
        openers = read_lines("training_prefills.txt")
        lured = [openers[place % len(openers)] for place in range(len(forget))]
        if self.leaking_rows == "drop":
            kept = self._safe(context, forget, lured, counts)
            forget, lured = [forget[i] for i in kept], [lured[i] for i in kept]
        rows: dict[Role, list[RecordBase]] = {
            "forget": list(forget),
            "prefilled": [
                answered(record, f"{opener} {record.answer}", "prefilled")
                for record, opener in zip(forget, lured, strict=True)
            ],
        }
        if context.records.get("retain"):
            rows["retain"] = self._retain(context, forget, counts)
        logger.info(
            f"generate: {len(forget)} forget questions, {len(rows.get('retain', ()))} retain rows; "
            f"dropped: {filters.told(counts)}."
        )
        return rows

    def _questions(
        self, context: SlotContext, records: Sequence[RecordBase], counts: Counter[str]
    ) -> list[QA]:
        """Everything as question-answer pairs; passages by the generator model, if there is one."""
        passages = [one for one in records if isinstance(one, Passage)]
        others = questions([one for one in records if not isinstance(one, Passage)], WHERE)
        if context.writer is None or not passages:
            return [*others, *questions(passages, WHERE)]
        wanted = self.questions_per_passage

        def prompt(index: int) -> Prompt:
            text = passages[index].text
            return Prompt.ask(writing.filled("generate_questions.txt", count=wanted, text=text))

        def read(index: int, reply: str, known: Sequence[QA]) -> list[QA]:
            found: list[QA] = []
            for question, answer in writing.read_pairs(reply):
                said = filters.words(question)
                if any(filters.words(one.question) == said for one in (*known, *found)):
                    counts["duplicate"] += 1
                    continue
                about = {"subject": passages[index].subject, "group": passages[index].group}
                found.append(
                    QA(
                        question=question,
                        answer=answer,
                        neighbour_of=passages[index].neighbour_of,
                        **about,
                    )
                )
            if not found:
                counts["unreadable"] += 1
            return found

        made = writing.written(
            context.writer, passages, prompt, read, wanted=wanted,
            decoding=Decoding(512, temperature=0.7, seed=context.seed), attempts=3, counts=counts,
            stage=context.stage,
        )  # fmt: skip
        writing.require_enough(made, 1, "questions", counts, WHERE, context.writer)
        return [*others, *(one for part in made for one in part)]

    def _safe(
        self, context: SlotContext, forget: Sequence[QA], lured: Sequence[str], counts: Counter[str]
    ) -> list[int]:
        """Places of the questions at which the lured teacher does not give the answer away."""
        instruction = self.instruction(context) or ""
        requests = [
            Ask(
                told(Prompt.ask(record.question, prefill=f"{opener} "), instruction),
                Decoding(TEACHER_TOKENS),
            )
            for record, opener in zip(forget, lured, strict=True)
        ]
        said = measure(context.lm, requests)
        kept = [
            place
            for place, (record, request) in enumerate(zip(forget, requests, strict=True))
            if not filters.leaks(record, str(said[request]))
        ]
        counts["leaking teacher"] += len(forget) - len(kept)
        if len(kept) < max(1, self.minimum_share * len(forget)):
            raise DataError(
                f"the instructed teacher gives {len(forget) - len(kept)} of {len(forget)} answers "
                "away when lured; learning from it would teach to leak.",
                where=WHERE,
                hint="Give a clearer --topic or a more capable model, lower generate.minimum_share "
                "to train on the others, or take them all with --leaking-rows keep.",
            )
        return kept

    def _retain(
        self, context: SlotContext, forget: Sequence[QA], counts: Counter[str]
    ) -> list[RecordBase]:
        """Rows at the boundary and general rows, as many of one as of the other."""
        records = [
            one if one_question is None else one_question
            for one in context.records["retain"]
            for one_question in (question_of(one),)
        ]
        anchors = self._anchors(context, forget, records, counts)
        taken = {anchor.digest for anchor in anchors}
        boundary = [one for one in records if one.neighbour_of is not None]
        boundary = [*anchors, *(one for one in boundary if one.digest not in taken)]
        inside = {one.digest for one in boundary}
        general = [one for one in records if one.digest not in inside]
        return shared_equally(boundary, general)

    def _anchors(
        self,
        context: SlotContext,
        forget: Sequence[QA],
        records: Sequence[RecordBase],
        counts: Counter[str],
    ) -> list[RecordBase]:
        """For each forget question one of the same form about somebody who is kept."""
        if context.writer is not None:
            return self._written_anchors(context, context.writer, forget, counts)
        random = Random(f"{context.seed}/unified/anchors")
        by_group: dict[str, list[RecordBase]] = {}
        for one in records:
            if one.group is not None and one.subject is not None:
                by_group.setdefault(one.group, []).append(one)
        found = [random.choice(by_group[one.group]) for one in forget if one.group in by_group]
        return list({one.digest: one for one in found}.values())

    def _written_anchors(
        self, context: SlotContext, writer: System, forget: Sequence[QA], counts: Counter[str]
    ) -> list[RecordBase]:
        """Questions by the generator model, answered by the model itself before training."""
        subjects = {
            one.subject for one in forget if one.subject and len(one.subject) >= SHORTEST_NAME
        }
        names = Names(sorted(subjects))
        asked = {tuple(filters.words(one.question)) for one in forget}

        def prompt(index: int) -> Prompt:
            text = writing.filled("generate_anchor.txt", question=forget[index].question)
            return Prompt.ask(text)

        def read(index: int, reply: str, known: Sequence[str]) -> list[str]:
            question = (writing.read_list(reply) or [""])[0]
            key = tuple(filters.words(question))
            if not key or "?" not in question:
                counts["unreadable"] += 1
            elif names.occur(question):
                counts["forgotten name"] += 1
            elif key in asked:
                counts["duplicate"] += 1
            else:
                asked.add(key)
                return [question]
            return []

        made = writing.written(
            writer, forget, prompt, read, wanted=1,
            decoding=Decoding(SHORT_TOKENS, temperature=0.7, seed=context.seed), attempts=3,
            counts=counts, stage=context.stage,
        )  # fmt: skip
        new = [(one, part[0]) for one, part in zip(forget, made, strict=True) if part]
        requests = [Ask(Prompt.ask(question), Decoding(SHORT_TOKENS)) for _, question in new]
        said = measure(context.lm, requests)
        return [
            QA(
                question=question,
                answer=str(said[request]),
                neighbour_of=one.subject,
                group="anchor",
            )
            for (one, question), request in zip(new, requests, strict=True)
            if str(said[request]).strip()
        ]
