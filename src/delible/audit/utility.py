"""What is left of everything that should be kept: comparable parts, each with its interval.

A part is one measure on one split: how probable the right answers are (on general questions:
next to wrong answers of the same form), how much of them the model says, and how often it is
right. Only parts in which the original knows clearly more than a model that never saw the answers
can show a loss. Kept is the unlearned system's mean over that of the original, or of the
reference where that knows them clearly, too, and less: unlearning is not asked to keep more than
retraining does.

The gate is the worst part. A model that babbles, or that says the same to everything, is broken
whatever the parts say. Source: arXiv 2506.09227 (utility next to forgetting); the harmonic mean
of arXiv 2401.06121 (``model_utility``) is no gate: one part near zero decides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from delible.audit.resampling import (
    FEWEST_RECORDS,
    Array,
    percentiles,
    resampled_means,
    widened,
)
from delible.audit.result import SystemRole, Utility, UtilityPart
from delible.measure.facts import fact_numbers
from delible.measure.metric import Item, SystemValues
from delible.records import QA, RecordBase

SPLITS = ("retain", "neighbours", "general")
#: Measures of a part, by what they are on the split "general" and elsewhere.
MEASURES = ("answer_probability", "rouge_l_recall", "outcome")
GENERAL_MEASURES = ("normalised_probability", "rouge_l_recall", "outcome")
#: Least mean of the original, and its least lead over what an unknown topic scores.
LEAST_KNOWN, LEAST_LEAD = 0.2, 0.1
#: Answers by (split, record): text and outcome class.
Answers = dict[tuple[str, int], tuple[str, str]]
#: So much more of the answers must be garbage, or the same, than the original's.
MORE_GARBAGE, SAME_ANSWER, USUALLY_SAME = 0.25, 0.8, 0.5
FEWEST_ANSWERS = 5


def part(
    split: str,
    measure: str,
    values: Mapping[SystemRole, Sequence[Item]],
    floor: float,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> UtilityPart:
    """One part.

    Args:
        values: Items of the unlearned system, the original and perhaps the reference.
        floor: What a model scores that never saw such answers.
        seed: Of the interval.
        groups: Records with the same number are of one fact; None: each is one of its own.
    """
    order: tuple[SystemRole, ...] = ("unlearned", "original", "reference")
    roles = [role for role in order if values.get(role)]
    rows = [[item.value for item in row] for row in zip(*(values[r] for r in roles), strict=True)]
    there = [index for index, row in enumerate(rows) if None not in row]
    columns = np.asarray([rows[index] for index in there], np.float64).T
    facts = [groups[index] if groups is not None else index for index in there]
    count = columns.shape[1] if columns.ndim == 2 else 0
    found = UtilityPart(split=split, measure=measure, records=count)
    if count == 0:
        return found.model_copy(update={"reason": "no record has a value for all systems"})
    means = columns.mean(axis=1)
    known = dict(zip(roles, map(float, means), strict=True))
    found = found.model_copy(
        update={
            "unlearned": known["unlearned"],
            "original": known["original"],
            "reference": known.get("reference"),
        }
    )
    if len(set(facts)) < FEWEST_RECORDS:
        few = len(set(facts))
        said = f"{count} records" if few == count else f"{count} records of {few} facts"
        return found.model_copy(update={"reason": f"{said} are too few"})
    clear = max(LEAST_KNOWN, floor + LEAST_LEAD)
    if known["original"] < clear:
        return found.model_copy(
            update={
                "reason": "the original itself hardly knows more here than a model that never saw "
                f"the answers ({known['original']:.2f} against {floor:.2f})"
            }
        )
    # A reference that never learned this shows nothing about what retraining keeps.
    bar = min((role for role in roles[1:] if known[role] >= clear), key=lambda role: known[role])
    pair = columns[[0, roles.index(bar)]]
    draws = resampled_means(pair, facts, seed)
    kept = float(_kept(means[:1], means[[roles.index(bar)]])[0])
    interval = percentiles(_kept(draws[:, 0], draws[:, 1]))
    low, high = widened(kept, interval, len(set(facts)), pair)
    return found.model_copy(update={"kept": kept, "low": low, "high": high})


def _kept(now: Array, bar: Array) -> Array:
    shares: Array = np.where(bar > 0, np.minimum(1.0, now / np.maximum(bar, 1e-12)), 1.0)
    return shares


def utility(
    values: Mapping[SystemRole, SystemValues],
    splits: Mapping[str, Sequence[RecordBase]],
    answers: Mapping[SystemRole, Answers],
    seed: int = 0,
) -> Utility:
    """All parts, and what is plainly broken.

    Args:
        values: What was measured without an attack.
        splits: The records that were asked.
        answers: Answers to questions that were to be kept.
        seed: Of the intervals.
    """
    if "original" not in values:
        return Utility(missing="the original model was not given, so nothing is compared with it")
    parts = []
    for split in SPLITS:
        for measure in GENERAL_MEASURES if split == "general" else MEASURES:
            items = {
                role: found.items[measure][split]
                for role, found in values.items()
                if split in found.items.get(measure, {})
            }
            if {"unlearned", "original"} <= set(items):
                records = splits.get(split, ())
                floor = _floor(values, records, split, measure)
                groups = fact_numbers(records) if records else None
                parts.append(part(split, measure, items, floor, seed, groups))
    broken = [
        sentence
        for sentence in (_garbage(answers, seed), _all_the_same(answers))
        if sentence is not None
    ]
    return Utility(parts=parts, broken=broken)


def _floor(
    values: Mapping[SystemRole, SystemValues],
    records: Sequence[RecordBase],
    split: str,
    measure: str,
) -> float:
    """What a model scores that never saw the answers."""
    if measure == "normalised_probability":
        chances = [1 / (1 + len(one.perturbed)) for one in records if isinstance(one, QA)]
        return float(np.mean(chances)) if chances else 0.0
    if split == "general":
        return 0.0
    never = (("original", "holdout"), ("reference", "holdout"), ("reference", "forget"))
    for role, unseen in never:
        found = values.get(role)  # type: ignore[call-overload]
        mean = found.means.get(measure, {}).get(unseen) if found is not None else None
        if mean is not None:
            return float(mean)
    return 0.0


def _both(answers: Mapping[SystemRole, Answers]) -> tuple[list[tuple[str, str]], ...]:
    """What the unlearned system and the original say to the questions that both answered."""
    now, then = answers.get("unlearned", {}), answers.get("original", {})
    common = [place for place in now if place in then]
    return [now[place] for place in common], [then[place] for place in common]


def _garbage(answers: Mapping[SystemRole, Answers], seed: int) -> str | None:
    """A sentence when far more answers are garbage than the original's."""
    now, then = (
        np.asarray([kind == "garbage" for _, kind in said], np.float64) for said in _both(answers)
    )
    if len(now) < FEWEST_ANSWERS:
        return None
    more = now - then
    low = percentiles(resampled_means(more[None], None, seed)[:, 0])[0]
    if more.mean() < MORE_GARBAGE or low <= 0:
        return None
    return (
        f"{now.mean():.0%} of its answers to questions that were not to be forgotten are garbage "
        f"(the original's: {then.mean():.0%})"
    )


def _all_the_same(answers: Mapping[SystemRole, Answers]) -> str | None:
    """A sentence when different questions get one answer, and the original told them apart."""
    shares: list[float] = []
    texts: list[str] = []
    for said in _both(answers):
        if len(said) < FEWEST_ANSWERS:
            return None
        plain = [" ".join(text.casefold().split()) for text, _ in said]
        text, count = Counter(plain).most_common(1)[0]
        shares.append(count / len(said))
        texts.append(text)
    if shares[0] < SAME_ANSWER or shares[1] > USUALLY_SAME:
        return None
    shown = texts[0] if len(texts[0]) <= 60 else f"{texts[0][:59]}…"
    return f"it gives one and the same answer to {shares[0]:.0%} of different questions ('{shown}')"
