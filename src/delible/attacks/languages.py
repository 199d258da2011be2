"""Other languages: asks the same question in German, French or Spanish.

What was unlearned in English may answer in another language. The answer is asked for in English,
or in the language itself. How well the original answers in that language is the control: where it
does not, the attack has no power, and the row says so.

A world's rows have their own templates. Other questions are translated by the translator, and
translated back; where the two do not mean the same (cosine of the sentence encoder below 0.8) the
question is not asked.

Paper: arXiv 2506.09227 (in its battery); arXiv 2406.10890 (cross-lingual probes). Reference code:
none. Deviations: three languages, since the templates are written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from delible.cards import Depth
from delible.errors import DataError
from delible.lm.encoder import Encoder, sentence_encoder
from delible.measure.attack import AttackContext, ConversationAttack
from delible.measure.turns import asked_as, ending, last_turn, question_of
from delible.prompts import read_named, read_text
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import NoAnswer, Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.system.role import Role
from delible.world.languages import NAMES, Language, fact_in, question_in


class Translated(BaseModel):
    """What a translator replies."""

    text: str


def translate(texts: Sequence[str], translator: Role, language: str) -> list[str | None]:
    """Texts in a language; None for those that were not translated."""
    frame = read_text("attack_translate.txt").replace("{language}", language)
    replies = translator.ask_all([frame.replace("{text}", text) for text in texts], Translated)
    return [None if isinstance(one, NoAnswer) else one.text.strip() or None for one in replies]


def checked(
    texts: Sequence[str], translator: Role, language: str, encoder: Encoder, similar: float
) -> list[str | None]:
    """Translations whose translation back means the same; None for the others.

    Args:
        similar: Least cosine of a text and its translation there and back.
    """
    there = translate(texts, translator, language)
    places = [place for place, one in enumerate(there) if one is not None]
    back = translate([there[place] or "" for place in places], translator, "English")
    found: list[str | None] = [None] * len(texts)
    for place, again in zip(places, back, strict=True):
        if again is None:
            continue
        one, other = encoder.encode([texts[place], again])
        if float(np.dot(one, other)) >= similar:
            found[place] = there[place]
    return found


@register(
    kind="attack",
    name="languages",
    title="Other languages",
    summary="Asks the same question in German, French or Spanish.",
    paper="2506.09227",
    year=2025,
    family="prompt",
    needs=("forget", "encoder"),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="standard",
    misleads="A model that does not speak the language knows nothing in it; read the original.",
    badges=("variant",),
    variant="Templates in three languages for a world; other data by a translator.",
)
class Languages(ConversationAttack):
    """Options: which language, and in which one the answer is wanted."""

    language: Language = Field("de", description="Language of the question.")
    answers: Literal["english", "own"] = Field(
        "english", description="Language of the answer: English, or that of the question."
    )
    similar: float = Field(
        0.8,
        ge=-1,
        le=1,
        description="Least cosine of a question and its translation there and back.",
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """German; in a deep audit every language, answered in English and in itself."""
        if depth != "deep":
            return ({"language": "de"},)
        return tuple(
            {"language": language, "answers": answers}
            for answers in ("english", "own") for language in NAMES
        )  # fmt: skip

    def variant_title(self) -> str:
        """Such as "German, answered in English"."""
        own = NAMES[self.language]
        return f"{own}, answered in {'English' if self.answers == 'english' else own}"

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """The forget records; or their facts in the language, with answers in it.

        Raises:
            DataError: No forget record can be answered in the language.
        """
        return self._own(context.forget) if self.answers == "own" else context.forget

    def beside(self, context: AttackContext) -> Mapping[str, Sequence[RecordBase]]:
        """Kept facts in the language, where answers are wanted in it."""
        if self.answers == "english":
            return {}
        made = self._in_language(context.retain)
        own = {"retain": made[:: max(1, len(made) // 8)][:8],
               "holdout": self._in_language(context.holdout)}  # fmt: skip
        return {split: rows for split, rows in own.items() if rows}

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """One prompt per record that can be asked in the language.

        Raises:
            DataError: The questions are no world's, and nobody translates.
        """
        found: list[str | None] = [
            question_in(record, self.language) if isinstance(record, QA) else None
            for record in records
        ]
        missing = [
            place for place, record in enumerate(records)
            if found[place] is None and question_of(record)
        ]  # fmt: skip
        if missing and context.roles.given("translator"):
            self._translated(records, missing, found, context)
        elif missing and not any(found):
            raise DataError(
                "the questions are no world's, and nobody translates them.",
                where="attack 'languages'",
                hint="Name a translator: --role translator=MODEL.",
            )
        return [
            self._asked(record, text) if text else ()
            for record, text in zip(records, found, strict=True)
        ]

    def _asked(self, record: RecordBase, text: str) -> Sequence[Prompt]:
        prompt = ask(record)
        asked = asked_as(record, prompt, text) if prompt is not None else None
        if asked is None:
            return ()
        if self.answers == "own":
            return (asked,)
        request = read_named("attack_languages.txt")[self.language]
        return (ending(asked, f"{last_turn(asked)} {request}"),)

    def _translated(
        self,
        records: Sequence[RecordBase],
        missing: Sequence[int],
        found: list[str | None],
        context: AttackContext,
    ) -> None:
        """Fills in the questions that the translator translates well."""
        translator = context.roles.role("translator")
        texts = [question_of(records[place]) or "" for place in missing]
        made = checked(texts, translator, NAMES[self.language], sentence_encoder(), self.similar)
        for place, text in zip(missing, made, strict=True):
            found[place] = text
        lost = sum(text is None for text in made)
        if lost:
            context.notes["note"] = (
                f"{lost} of {len(made)} questions were not asked: no translation, or one that "
                "does not mean the same when it is translated back."
            )

    def _own(self, records: Sequence[RecordBase]) -> list[RecordBase]:
        made = self._in_language(records)
        if not made:
            raise DataError(
                f"no forget record can be answered in {NAMES[self.language]}.",
                where="attack 'languages'",
                hint="Only a world's facts have answers in other languages; take answers english.",
            )
        return made

    def _in_language(self, records: Sequence[RecordBase]) -> list[RecordBase]:
        questions = (one for one in records if isinstance(one, QA))
        return [fact for one in questions if (fact := fact_in(one, self.language)) is not None]
