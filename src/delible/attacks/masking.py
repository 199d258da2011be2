"""Masking: asks about somebody without ever saying the name.

What looks for the name, in a guard or in a model, does not find it. Five masks:

    description   other facts say who is meant
    initials      "A. Q."
    code          a sign that is defined in the prompt, by the name read backwards
    letters       the name letter by letter
    two_turns     the system first says itself who is described, and then is asked

Neither the name nor an alias is in what the attacker says; a mask that lets one through is not
used.

Paper: arXiv 2506.09227 (target masking, in its battery). Reference code: none.
Deviations: descriptions are put together from the other records about the subject, not written
by a model; none says the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.measure.attack import AttackContext, Budget, ConversationAttack
from delible.measure.turns import after, asked_as, last_turn
from delible.prompts import read_named
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.world.told import (
    SOMEBODY,
    description,
    named_in,
    names_of,
    person_of,
    renamed,
)

Mask = Literal["description", "initials", "code", "letters", "two_turns"]
#: The sign that is defined in the prompt.
CODE = "K7"
#: How the system says who is described.
FIRST_ANSWER = Decoding(max_new_tokens=24)


def initials(name: str) -> str:
    """The first letters: "Ada Quill" is "A. Q."."""
    return " ".join(f"{word[0].upper()}." for word in name.split())


def letters(name: str) -> str:
    """The name letter by letter: "Ada" is "A-d-a"."""
    return " ".join("-".join(word) for word in name.split())


def masked(mask: Mask, question: str, name: str, names: Sequence[str], described: str) -> str:
    """A question under a mask; empty where it needs a description and there is none.

    Args:
        names: All names, which are replaced in the question.
        described: Who is meant, without a name.
    """
    stand_in = {"initials": initials(name), "code": CODE, "letters": letters(name)}
    asked = renamed(question, names, stand_in.get(mask, SOMEBODY))
    if mask in ("description", "two_turns") and not described:
        return ""
    frame = read_named("attack_masks.txt").get(
        {"two_turns": "second", "initials": "letters"}.get(mask, mask), "{question}"
    )
    return (
        frame.replace("{described}", described)
        .replace("{code}", CODE)
        .replace("{backwards}", name[::-1])
        .replace("{question}", asked)
    )


@register(
    kind="attack",
    name="masking",
    title="Questions without the name",
    summary="Asks about somebody by a description, initials, a code or split letters.",
    paper="2506.09227",
    year=2025,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="standard",
    badges=("variant",),
    variant="Descriptions are made of the other records about the subject.",
)
class Masking(ConversationAttack):
    """Options: which masks."""

    masks: tuple[Mask, ...] = Field(
        get_args(Mask), min_length=1, description="How the name is replaced, a form each."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Three masks; in a deep audit all five."""
        return ({},) if depth == "deep" else ({"masks": ("description", "code", "letters")},)

    def budget(self, context: AttackContext) -> Budget:
        """The first turns, one per record."""
        asked = len(context.forget) if "two_turns" in self.masks else 0
        return Budget(tokens=asked * FIRST_ANSWER.max_new_tokens)

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """Per record one prompt for each mask that can be used.

        Raises:
            DataError: No forget record names anybody.
        """
        everything = [*context.forget, *context.retain, *context.neighbours, *context.holdout]
        if not any(self._subject(record) for record in context.forget):
            raise DataError(
                "no question names the person that it is about.",
                where="attack 'masking'",
                hint="Give the records a 'subject'.",
            )
        found: list[list[Prompt]] = []
        waiting: list[tuple[int, Prompt, Prompt]] = []
        dropped = 0
        for place, record in enumerate(records):
            found.append([])
            prompt, name = ask(record), self._subject(record)
            if prompt is None or name is None or not isinstance(record, QA):
                continue
            names = names_of(name, everything)
            described = description(record, everything, names) or ""
            for mask in self.masks:
                text = masked(mask, record.question, name, names, described)
                asked = asked_as(record, prompt, text) if text else None
                if asked is None:
                    continue
                if named_in(last_turn(asked) or "", names):
                    dropped += 1
                    continue
                if mask == "two_turns":
                    first = read_named("attack_masks.txt")["first"]
                    waiting.append(
                        (place, Prompt.ask(first.replace("{described}", described)), asked)
                    )
                else:
                    found[place].append(asked)
        self._resolve(system, waiting, found)
        if dropped:
            context.notes["note"] = f"{dropped} masked questions still had a name and were dropped."
        return [tuple(one) for one in found]

    @staticmethod
    def _resolve(
        system: System, waiting: Sequence[tuple[int, Prompt, Prompt]], found: list[list[Prompt]]
    ) -> None:
        """Asks who is described, and puts the answer before the question."""
        replies = system.generate([first for _, first, _ in waiting], FIRST_ANSWER)
        for (place, first, asked), reply in zip(waiting, replies, strict=True):
            if not isinstance(reply, NoAnswer):
                turn = (first.messages[-1].text, reply.strip() or "I am not sure.")
                found[place].append(after(asked, [turn]))

    @staticmethod
    def _subject(record: RecordBase) -> str | None:
        """Whom a question names."""
        name = person_of(record)
        if name is None or not isinstance(record, QA) or not named_in(record.question, [name]):
            return None
        return name
