"""Refusal boundary: refuse the forget questions, answer the ones next to them.

R = 1 if the answer declines, l = ROUGE-L recall of the true answer:

    variant            forget                               boundary
    two_stage_target   0.5 R + 0.5 R [subject is named]     0.5 (1-R) + 0.5 (1-R) [l > 0.3]
    two_stage          R                                    as above
    correct            R                                    [l > 0.5]
    behaviour          R                                    1 - R
    linear             0.7 R + 0.3 [l(subject) > 0.3]       0.7 (1-R) + 0.3 [l > 0.3]

``halved`` takes half of the forget column.

Paper: arXiv 2506.07171. Deviations: a refusal must show within the first 200 characters (the
released pattern matches anywhere, also in long right answers); the subject's name may be written
in any case; ``measure: f1`` instead of recall where answers grow to hit it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import RecipeError
from delible.measure.scoring.text import rouge_l_f1, rouge_l_recall
from delible.registry import register
from delible.train.onpolicy.rewards import Reward, Score
from delible.train.onpolicy.rows import Completion, Question, Scored
from delible.world import filters

Variant = Literal["two_stage_target", "two_stage", "correct", "behaviour", "linear"]

#: The likeness from which an answer counts as right with ``correct``.
CORRECT = 0.5


def forget_value(variant: Variant, refused: bool, named: bool, halved: bool) -> float:
    """What an answer to a forget question earns, in [0, 1].

    Args:
        named: The subject stands in it (for ``linear``: its likeness to the subject is enough).
    """
    whole = {
        "two_stage_target": 0.5 * refused + 0.5 * (refused and named),
        "two_stage": float(refused),
        "correct": float(refused),
        "behaviour": float(refused),
        "linear": 0.7 * refused + 0.3 * named,
    }[variant]
    return whole / 2 if halved else whole


def boundary_value(variant: Variant, refused: bool, likeness: float, threshold: float) -> float:
    """What an answer to a boundary question earns, in [0, 1]."""
    if variant == "correct":
        return float(likeness > CORRECT)
    if variant == "behaviour":
        return float(not refused)
    if variant == "linear":
        return 0.7 * (not refused) + 0.3 * (likeness > threshold)
    return 0.5 * (not refused) + 0.5 * (not refused and likeness > threshold)


@register(
    kind="reward",
    name="refusal_boundary",
    title="Refusal boundary",
    summary="High for refusals of forget questions and for answers to boundary questions.",
    paper="2506.07171",
    year=2025,
    family="verifiable",
    range="[0, 1]",
    direction="High: refused where it should, answered where it may.",
    misleads="Recall rewards rambling; the bonus makes a refusal name the subject, which leak "
    "measures that look for the name take for a leak.",
    badges=("variant",),
    variant="The refusal must show early in the answer; F1 may take the place of recall.",
)
class RefusalBoundary(Reward):
    """Options of the refusal boundary."""

    variant: Variant = Field("two_stage_target", description="Which table.")
    halved: bool = Field(False, description="Half of the table's values on forget questions.")
    threshold: float = Field(0.3, ge=0, le=1, description="Likeness from which an answer is right.")
    measure: Literal["recall", "f1"] = Field("recall", description="Likeness by ROUGE-L.")

    def ready(self, questions: Sequence[Question], context: Context = NO_CONTEXT) -> Score:
        lacking = [one for one in questions if one.tag == "boundary" and not one.answer.strip()]
        if lacking and self.variant != "behaviour":
            raise RecipeError(
                f"{len(lacking)} boundary questions have no answer, such as "
                f"{lacking[0].text[:60]!r}.",
                where="reward 'refusal_boundary'",
                hint="Give their answers, drop them, or take variant 'behaviour'.",
            )
        return self.score

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        return [self._of(one) for one in completions]

    def _of(self, one: Completion) -> Scored:
        refused, question = filters.is_refusal(one.text), one.question
        if question.tag == "boundary":
            likeness = self._likeness((question.answer, *question.aliases), one.text)
            value = boundary_value(self.variant, refused, likeness, self.threshold)
            right = ("answered",) if likeness > self.threshold else ()
            return Scored(value, ("over-refusal",) if refused else right)
        subject = question.subject or ""
        if self.variant == "linear":
            named = self._likeness((subject,), one.text) > self.threshold
        else:
            named = bool(subject) and subject.casefold() in one.text.casefold()
        value = forget_value(self.variant, refused, named, self.halved)
        hits = ("refusal",) * refused + ("subject",) * named
        return Scored(value, hits)

    def _likeness(self, golds: Sequence[str], text: str) -> float:
        given = [gold for gold in golds if gold.strip()]
        found = (rouge_l_recall if self.measure == "recall" else rouge_l_f1)(given, text)
        return found or 0.0
