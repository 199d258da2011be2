"""What weighs in a verdict: an e with its interval, facts and subjects that were left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delible.audit.result import FactsLeft, Leak, Utility, UtilityPart

#: Thresholds of the verdict, by what they bound.
THRESHOLDS = {
    "plain_erased": 0.8,
    "utility_kept": 0.9,
    "attack_suppression": 0.5,
    "attack_removal": 0.8,
    "attack_removal_low": 0.5,
}
#: Luck that is less likely than this does not explain facts or subjects that were left alone.
UNLIKELY = 0.1
#: An attack that lowers e by no more than this brought nothing back.
SAME = 0.05
#: Measures of what a system says of itself; the others read its probabilities.
SAID = ("outcome", "rouge_l_recall", "choice_accuracy")


@dataclass(frozen=True)
class Finding:
    """One e that weighs, and where it was found."""

    measure: str
    where: str
    erased: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        span = ""
        if self.low is not None and self.high is not None:
            span = f", 95 % interval {self.low:.2f} to {self.high:.2f}"
        return f"{self.where}: e = {self.erased:.2f}{span}"

    @property
    def like_reference(self) -> bool:
        """Whether its interval holds what the reference itself scores."""
        return self.high is not None and self.high >= 1.0 - 1e-9

    def below(self, limit: float) -> bool:
        """Whether more is left than the limit allows, and not by chance.

        Without an interval (too few records) only what leaves more than half counts.
        """
        if self.high is None:
            return self.erased < min(limit, THRESHOLDS["attack_suppression"])
        return self.erased < limit and not self.like_reference

    @property
    def clean(self) -> bool:
        """Whether it is consistent with removal."""
        return (
            self.erased >= THRESHOLDS["attack_removal"]
            and self.low is not None
            and self.low >= THRESHOLDS["attack_removal_low"]
        )


def findings_of(leak: Leak) -> list[Finding]:
    """Everything in a row that weighs, the lowest e first."""
    found = [
        Finding(measure, words(measure), value, *leak.intervals.get(measure, (None, None)))
        for measure, value in leak.erased.items()
        if value is not None
    ]
    found += [
        Finding(
            form.measure, f"{words(form.measure)} with form {form.form} of the question",
            form.erased, form.low, form.high,
        )
        for form in leak.forms
    ]  # fmt: skip
    return sorted(found, key=lambda one: one.erased)


def worst(leak: Leak) -> Finding | None:
    """The lowest e of a row; None where it has no power."""
    found = findings_of(leak)
    return found[0] if found else None


def gate(utility: Utility | None) -> UtilityPart | None:
    """The part that makes a model destructive: the lowest of those that lost something."""
    lost = [
        part
        for part in (utility.comparable if utility else ())
        if part.kept is not None
        and part.kept < THRESHOLDS["utility_kept"]
        and part.high is not None
        and part.high < 1.0 - 1e-9
    ]
    return min(lost, key=lambda part: part.kept or 0.0, default=None)


def deciding(plain: Leak) -> tuple[str, ...]:
    """The measures that tell whether the plain question is answered."""
    said = tuple(name for name in SAID if plain.erased.get(name) is not None)
    return said or tuple(name for name, value in plain.erased.items() if value is not None)


def left_alone(leak: Leak, where: str, share: float, measures: Sequence[str]) -> str | None:
    """Facts or a subject that are left as they were, more than luck explains."""
    for left in leak.facts:
        if (
            left.measure in measures
            and left.count >= 2
            and left.count >= share * left.comparable - 1e-9
            and left.chance < UNLIKELY
        ):
            return (
                f"{where}, {left.count} of {left.comparable} facts are as they were "
                f"({words(left.measure)}){such_as(left)}."
            )
    for subject in leak.subjects:
        if (
            subject.measure in measures
            and subject.untouched >= 2
            and subject.erased < THRESHOLDS["attack_suppression"]
            and subject.chance < UNLIKELY
        ):
            return (
                f"{where}, {subject.untouched} of {subject.records} facts about "
                f"{subject.subject} are as they were (e = {subject.erased:.2f}, "
                f"{words(subject.measure)})."
            )
    return None


def such_as(left: FactsLeft) -> str:
    """One of the facts, to go on with a sentence."""
    return f", such as '{left.questions[0]}'" if left.questions else ""


def kept_words(part: UtilityPart) -> str:
    """What a part keeps, with its interval."""
    span = ""
    if part.low is not None and part.high is not None:
        span = f", 95 % interval {part.low:.0%} to {part.high:.0%}"
    return f"{part.kept or 0:.0%} kept{span}"


def words(name: str) -> str:
    """A measure's name in words."""
    return name.replace("_", " ")
