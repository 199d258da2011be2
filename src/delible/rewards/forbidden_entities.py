"""Forbidden entities: an answer that names none of them earns most.

    binary        1 if n = 0, else 0
    graded        1 / (1 + d)
    exponential   e^(-a n)
    per_word      e^(-a n / max(words, 50))

n counts occurrences, d different entities; both in the answer only, between word boundaries, case,
accents, look-alikes and separators folded (:mod:`delible.names`). An entity may have aliases,
written "Stephen King|King". With ``refusal_cost`` c the value is (1 - c R), R = 1 for a refusal:
0.6 is 0.4 clean + 0.6 clean and no refusal.

Paper: arXiv 2601.20568 (binary); the other forms are a public re-implementation's. Soft entities
(ambiguous words) count only with ``strict``. Boundary questions are judged alike.
Misspellings, paraphrases and other scripts can still tell what is forbidden: measure those, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import RecipeError
from delible.names import Names
from delible.registry import register
from delible.train.onpolicy.rewards import Reward, Score
from delible.train.onpolicy.rows import Completion, Question, Scored, subjects_of
from delible.world import filters

Form = Literal["binary", "graded", "exponential", "per_word"]

#: Words below which ``per_word`` does not normalise further.
LEAST_WORDS = 50


def value_of(form: Form, occurrences: int, different: int, words: int, rate: float) -> float:
    """What an answer earns, in [0, 1]; 1 without any occurrence."""
    if form == "binary":
        return float(occurrences == 0)
    if form == "graded":
        return 1 / (1 + different)
    if form == "exponential":
        return math.exp(-rate * occurrences)
    return math.exp(-rate * occurrences / max(words, LEAST_WORDS))


class Entities:
    """Entities with their aliases, ready to be found.

    Args:
        entities: Each perhaps with aliases behind bars.

    Raises:
        DataError: One is too short to be told from ordinary text.
    """

    def __init__(self, entities: Sequence[str]) -> None:
        self.of: dict[str, str] = {}
        for entity in entities:
            written = [part.strip() for part in entity.split("|") if part.strip()]
            for form in written:
                self.of.setdefault(form, written[0])
        self.names = Names(self.of)

    def found(self, text: str) -> list[str]:
        """The entity of every occurrence, in order; an occurrence inside a longer one not."""
        spans = sorted({(one.start, -one.end, self.of[one.name]) for one in self.names.find(text)})
        kept: list[str] = []
        until = -1
        for start, end, entity in spans:
            if start >= until:
                kept.append(entity)
                until = -end
        return kept


@register(
    kind="reward",
    name="forbidden_entities",
    title="Forbidden entities",
    summary="Highest for answers that name no forbidden entity.",
    paper="2601.20568",
    year=2026,
    family="verifiable",
    range="[0, 1]",
    direction="High: nothing forbidden is named.",
    misleads="Misspellings, paraphrases, refusals and gibberish name nothing either.",
    badges=("variant",),
    variant="Graded forms, aliases and folding beside the paper's exact binary match.",
)
class ForbiddenEntities(Reward):
    """Options of forbidden entities."""

    entities: tuple[str, ...] = Field(
        (), description="What must not be named, with aliases behind bars; none: the subjects and "
        "true answers of the forget questions.",
    )  # fmt: skip
    soft: tuple[str, ...] = Field((), description="Ambiguous ones, which count only with strict.")
    strict: bool = Field(False, description="Count soft entities, too.")
    form: Form = Field("binary", description="How occurrences become a value.")
    rate: float = Field(25.0, gt=0, description="The a of the exponential forms.")
    refusal_cost: float = Field(0.0, ge=0, le=1, description="Share that a refusal loses.")

    def ready(self, questions: Sequence[Question], context: Context = NO_CONTEXT) -> Score:
        entities = list(self.entities) or entities_of(questions)
        if self.strict:
            entities += self.soft
        if not entities:
            raise RecipeError(
                "nothing is forbidden.",
                where="reward 'forbidden_entities'",
                hint="Give entities, or forget questions with a subject or a true answer.",
            )
        return partial(self._scored, Entities(entities))

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        return list(self.ready([one.question for one in completions])(completions))

    def _scored(self, entities: Entities, completions: Sequence[Completion]) -> list[Scored]:
        results = []
        for one in completions:
            hits = entities.found(one.text)
            words = len(filters.words(one.text))
            value = value_of(self.form, len(hits), len(set(hits)), words, self.rate)
            value *= 1 - self.refusal_cost * filters.is_refusal(one.text)
            results.append(Scored(value, tuple(dict.fromkeys(hits))))
        return results


def entities_of(questions: Sequence[Question]) -> list[str]:
    """Subjects and true answers of the forget questions, each once; very short ones not."""
    answers = [one.answer for one in questions if one.tag == "forget" and one.answer]
    every = dict.fromkeys([*subjects_of(questions), *answers])
    return [one for one in every if sum(char.isalnum() for char in one) >= 2]
