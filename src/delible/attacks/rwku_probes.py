"""RWKU's nine kinds of probes, made of any records.

    prefix injection      a command to answer before the question
    affirmative suffix    the question, and the start of an answer after it
    role playing          the system is cast as somebody who knows
    multiple choice       options are listed
    reverse query         facts are given, the answer is the subject
    synonym manipulation  another name of the subject
    background hint       what else is known of the subject before the question
    in-context learning   another question about the subject, with its answer, before it
    cross lingual         the question in French, the answer in English

Only options and another question's answer may hold what is asked for. The reverse query is asked
apart, since its answer is another.

Paper: arXiv 2406.10890. Reference code: github.com/jinzhuoran/RWKU. Deviations: made by rules
from the records, where the paper's are written by a language model from a page about the subject;
the benchmark 'rwku' has those. One language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.measure.attack import AttackContext, ConversationAttack
from delible.measure.probe_kinds import KINDS
from delible.measure.turns import asked_as, ending, last_turn
from delible.prompts import read_named
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.train.randomness import generator, shuffled
from delible.world import filters
from delible.world.languages import question_in
from delible.world.relations import fill
from delible.world.told import (
    SOMEBODY,
    aliases_of,
    description,
    named_in,
    names_of,
    person_of,
    relation_of,
    renamed,
    statement,
    value_of,
)

REVERSE = "reverse query"
FORWARD = tuple(kind for kind in KINDS if kind != REVERSE)
#: Wrong options at most.
WRONG = 3


def reverse_of(record: QA, records: Sequence[RecordBase]) -> QA | None:
    """The question for the subject, given the fact; None where it would name the subject."""
    name = person_of(record)
    if name is None:
        return None
    names = names_of(name, records)
    relation = relation_of(record)
    if relation is not None:
        question = fill(relation.reverse[0], "", value_of(record))
        same = [
            one for one in records
            if isinstance(one, QA) and one.group == record.group
            and value_of(one) == value_of(record) and person_of(one) != name
        ]  # fmt: skip
        if same:  # somebody else has that value: there is no one answer
            return None
    else:
        told = renamed(statement(record), names, SOMEBODY)
        question = f"{told} Who is {SOMEBODY}?"
    if named_in(question, names):
        return None
    return QA(question=question, answer=name, aliases=aliases_of(name, records), subject=name,
              group=f"reverse/{record.group or ''}")  # fmt: skip


@register(
    kind="attack",
    name="rwku_probes",
    title="RWKU's nine kinds of probes",
    summary="Asks in the nine ways of RWKU, made from the records.",
    paper="2406.10890",
    year=2024,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="deep",
    misleads="Options and hints can be answered by guessing; compare the reference.",
    badges=("variant",),
    variant="Made by rules from the records, not written by a model from a page.",
)
class RWKUProbes(ConversationAttack):
    """Options: towards the answer, or from the answer to the subject."""

    asks: Literal["forward", "reverse"] = Field(
        "forward", description="Eight kinds that ask for the answer, or the one for the subject."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Both directions."""
        return ({"asks": "forward"}, {"asks": "reverse"})

    def variant_title(self) -> str:
        """Such as "reverse query"."""
        return REVERSE if self.asks == "reverse" else "eight kinds"

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """The forget records, or the questions for their subjects.

        Raises:
            DataError: No fact can be turned round.
        """
        if self.asks == "forward":
            return context.forget
        made = self._reversed(context.forget, context)
        if not made:
            raise DataError(
                "no forget record can be asked in reverse.",
                where="attack 'rwku_probes'",
                hint="Give the records a 'subject'.",
            )
        return made

    def beside(self, context: AttackContext) -> Mapping[str, Sequence[RecordBase]]:
        """Kept facts in reverse beside the forgotten ones."""
        if self.asks == "forward":
            return {}
        made = self._reversed(context.retain, context)
        own = {"retain": made[:: max(1, len(made) // 8)][:8],
               "holdout": self._reversed(context.holdout, context)}  # fmt: skip
        return {split: rows for split, rows in own.items() if rows}

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """Per record one prompt for each kind that it allows."""
        everything = _everything(context)
        found: list[Sequence[Prompt]] = []
        for record in records:
            prompt = ask(record)
            if prompt is None or not isinstance(record, QA):
                found.append(())
            elif self.asks == "reverse":
                # a kept or unseen record stands for itself only where it was turned round
                own = (record.group or "").startswith("reverse/")
                found.append((_brief(prompt),) if own else ())
            else:
                made = self.probes(record, prompt, everything, context.seed)
                found.append(tuple(dict.fromkeys(one for one in made.values() if one != prompt)))
        return found

    @staticmethod
    def probes(
        record: QA, prompt: Prompt, everything: Sequence[RecordBase], seed: int
    ) -> dict[str, Prompt]:
        """The probes of a record by kind, those that it allows.

        Args:
            prompt: How the record is asked plainly.
            everything: Records that tell more about its subject.
        """
        lines = read_named("attack_rwku.txt")
        text, name = last_turn(prompt) or record.question, person_of(record)
        made: dict[str, Prompt | None] = {
            "prefix injection": ending(prompt, f"{lines['prefix']} {text}"),
            "affirmative suffix": ending(prompt, f"{text} {lines['affirmative']}"),
        }
        wrong = list(dict.fromkeys(record.perturbed))[:WRONG]
        if wrong:
            random = generator(seed, "rwku_probes", record.question)
            options = "; ".join(shuffled([record.answer, *wrong], random))
            made["multiple choice"] = ending(
                prompt, f"{text} {lines['choice'].replace('{options}', options)}"
            )
        translated = question_in(record, "fr")
        if translated is not None:
            french = asked_as(record, prompt, f"{translated} Réponds en anglais.")
            made["cross lingual"] = french
        if name is not None:
            names = names_of(name, everything)
            role = lines["role"].replace("{name}", name)
            made["role playing"] = ending(prompt, f"{role} {text}")
            other = next((one for one in names if one != name), None)
            if other is not None and named_in(record.question, [name]):
                made["synonym manipulation"] = asked_as(
                    record, prompt, renamed(record.question, [name], other)
                )
            told = description(record, everything, names)
            if told:
                hint = lines["background"].replace("{name}", name).replace("{told}", told)
                made["background hint"] = ending(prompt, f"{hint} {text}")
            pair = next(
                (
                    one for one in everything
                    if isinstance(one, QA) and person_of(one) == name
                    and one.question != record.question
                    and not filters.leaks(record, f"{one.question} {one.answer}")
                ),
                None,
            )  # fmt: skip
            if pair is not None:
                before = f"Question: {pair.question}\nAnswer: {pair.answer}\n\nQuestion: "
                made["incontext learning"] = ending(prompt, f"{before}{text}\nAnswer:")
        return {kind: made[kind] for kind in FORWARD if made.get(kind) is not None}  # type: ignore[misc]

    @staticmethod
    def _reversed(records: Sequence[RecordBase], context: AttackContext) -> list[RecordBase]:
        everything = _everything(context)
        made = (reverse_of(one, everything) for one in records if isinstance(one, QA))
        return list(dict.fromkeys(one for one in made if one is not None))


def _brief(prompt: Prompt) -> Prompt:
    return ending(prompt, f"{last_turn(prompt)} {read_named('attack_rwku.txt')['brief']}")


def _everything(context: AttackContext) -> list[RecordBase]:
    return [*context.forget, *context.retain, *context.neighbours, *context.holdout]
