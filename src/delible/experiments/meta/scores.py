"""How good is a metric: does it see knowledge, and does it see it before somebody digs it up?

All values are of one metric in the form "more knowledge = larger", in [0, 1] (:func:`knowledge`).
P are models that know what is to be forgotten, N models that never saw it. For a model that
unlearned (u) and a reference that never knew (r), each before (b) and after (a) an intervention:

    faithfulness = AUC of P against N
    R = min( (r_a - r_b) / (u_a - u_b), 1 ), not below 0         relearning
    Q = min( u_b / u_a, 1 )                                      quantization
    R' = 1 - |D_u - D_r| / (|D_u| + |D_r|),  D = after - before  the symmetric forms
    Q' = 1 - |u_a - u_b| / (u_a + u_b)
    robustness = HM(R, Q),   overall = HM(faithfulness, robustness)

A good metric has seen hidden knowledge before relearning, so it does not jump more on the
unlearned model than on the reference; the symmetric forms punish falls as well. R, Q and their
symmetric forms are means over the unlearned models that are still useful and that the metric
itself takes for unlearned: those at or below the threshold that tells P from N best.

Paper: OpenUnlearning (arXiv 2506.12618). Symmetric forms, clipping and threshold as in the
replication gnueaj/unlearning-depth-score. Deviations: two zeros are "no change" (1), where the
replication adds 1e-6 to the denominators; without a threshold no model passes, where there all do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from delible.bench.stages import mean
from delible.measure.scoring.separation import area_under_curve

#: How values of records become one number for a model.
How = Literal["mean", "closeness", "area"]
#: A value before and after an intervention; ``None`` where there is none.
Change = tuple[float | None, float | None]
#: Below this a difference is none.
NO_CHANGE = 1e-8
#: A part of the utility that the model before has less of is none that it could lose.
LEAST_PART = 0.1


# ---- from records to a model


def knowledge(
    how: How, forget: Sequence[float | None], holdout: Sequence[float | None] = ()
) -> float | None:
    """One number of a model, larger = it knows more of what is to be forgotten.

    Args:
        how: ``"mean"``: the mean over the forget records, of a metric in [0, 1] that grows with
            knowledge. ``"closeness"``: of raw truth ratios, 1 - mean of min(TR, 1 / TR), so that
            a model that cannot tell right from wrong has 0. ``"area"``: of a membership attack
            (larger = less likely seen), the area under the curve that tells forget records from
            holdout records, 1 = each was recognised as seen.
        forget: One value per forget record; records without one do not count.
        holdout: The same for records that no model saw (``"area"`` only).

    Returns:
        A value in [0, 1]; ``None`` where no record has a value.
    """
    told = [value for value in forget if value is not None]
    if how == "area":
        return area_under_curve(told, [value for value in holdout if value is not None])
    if how == "closeness":
        told = [1 - (min(ratio, 1 / ratio) if ratio > 0 else 0.0) for ratio in told]
    return mean(told)


def harmonic_mean(*parts: float | None) -> float | None:
    """Harmonic mean of numbers in [0, 1]: 0 as soon as one is 0, ``None`` as soon as one is."""
    told = [part for part in parts if part is not None]
    if len(told) < len(parts) or not told:
        return None
    return 0.0 if min(told) <= 0 else len(told) / sum(1 / part for part in told)


def counted(before: Mapping[str, float | None]) -> list[str]:
    """Names of the parts of utility that a model has at all."""
    return [name for name, part in before.items() if part is not None and part >= LEAST_PART]


def kept_utility(
    parts: Mapping[str, float | None], before: Mapping[str, float | None]
) -> float | None:
    """Utility as a share of that of the model before unlearning.

    Args:
        parts: Parts of the utility by name, each in [0, 1], of the model that unlearned.
        before: The same of the model before; those that it has less than 0.1 of do not count,
            since with one part near 0 a harmonic mean says nothing about the others.

    Returns:
        A value in [0, inf); ``None`` without parts that count, or if one of them is missing.
    """
    names = counted(before)
    now, then = (harmonic_mean(*(one.get(name) for name in names)) for one in (parts, before))
    return now / then if now is not None and then else None


# ---- faithfulness


def faithfulness(knowing: Sequence[float | None], ignorant: Sequence[float | None]) -> float | None:
    """Probability that a model that knows has a larger value than one that never saw.

    Args:
        knowing: One value per model of P.
        ignorant: One value per model of N.

    Returns:
        A value in [0, 1]: 1 = all told apart, 0.5 = the metric sees nothing, below: it is
        misled. ``None`` if one of the pools has no values.
    """
    return area_under_curve(
        [value for value in ignorant if value is not None],
        [value for value in knowing if value is not None],
    )


def threshold(knowing: Sequence[float | None], ignorant: Sequence[float | None]) -> float | None:
    """The value that tells P (at or above) from N (below) with the fewest errors.

    Candidates lie half-way between neighbouring values; of several that are equally good the
    lowest, which takes the fewest models for unlearned.

    Returns:
        A value; ``None`` if a pool has no values, or all values are the same.
    """
    high = [value for value in knowing if value is not None]
    low = [value for value in ignorant if value is not None]
    every = sorted({*high, *low})
    if not high or not low:
        return None

    def right(place: float) -> int:
        return sum(value >= place for value in high) + sum(value < place for value in low)

    between = [(one + other) / 2 for one, other in pairwise(every)]
    return max(between, key=right, default=None)


# ---- robustness


def relearning(reference: Change, unlearned: Change) -> float | None:
    """R: how much of the unlearned model's rise the reference shows as well.

    Args:
        reference: Value of the model that never knew, before and after it is trained on the
            forget records.
        unlearned: The same of the model that unlearned.

    Returns:
        A value in [0, 1]: 1 = the unlearned model rises no more than the reference, 0 = one of
        them rises and the other falls. ``None`` if a value is missing.
    """
    changes = _differences(reference, unlearned)
    if changes is None:
        return None
    expected, found = changes
    return 1.0 if abs(found) < NO_CHANGE else max(0.0, min(expected / found, 1.0))


def symmetric_relearning(reference: Change, unlearned: Change) -> float | None:
    """R': 1 where both change alike, 0 where only one does, or one rises and the other falls."""
    changes = _differences(reference, unlearned)
    if changes is None:
        return None
    expected, found = changes
    whole = abs(expected) + abs(found)
    return 1.0 if whole < NO_CHANGE else 1 - abs(found - expected) / whole


def quantization(unlearned: Change) -> float | None:
    """Q: 1 where rounding the weights brings nothing back, near 0 where it brings back all.

    Args:
        unlearned: Value of the unlearned model before and after quantization, not negative.

    Returns:
        A value in [0, 1]; ``None`` if a value is missing.
    """
    before, after = unlearned
    if before is None or after is None:
        return None
    return 1.0 if after <= before else before / after


def symmetric_quantization(unlearned: Change) -> float | None:
    """Q': as Q, but a fall is punished as well."""
    before, after = unlearned
    if before is None or after is None:
        return None
    whole = abs(after) + abs(before)
    return 1.0 if whole < NO_CHANGE else 1 - abs(after - before) / whole


def _differences(reference: Change, unlearned: Change) -> tuple[float, float] | None:
    (low, high), (before, after) = reference, unlearned
    if low is None or high is None or before is None or after is None:
        return None
    return high - low, after - before


# ---- the verdict on one metric


@dataclass(frozen=True)
class Tested:
    """One unlearned model in the eyes of one metric.

    Attributes:
        before: Value before anything is done to it.
        relearned: Values before and after relearning, on the records that are asked for it.
        quantized: Value after quantization.
        utility: Utility as a share of that of the model before unlearning.
    """

    before: float | None
    relearned: Change
    quantized: float | None
    utility: float | None


@dataclass(frozen=True)
class Robustness:
    """R, Q and their harmonic mean; ``None`` where no model could be judged."""

    relearning: float | None = None
    quantization: float | None = None

    @property
    def both(self) -> float | None:
        return harmonic_mean(self.relearning, self.quantization)


@dataclass(frozen=True)
class Verdict:
    """What a metric is worth.

    Attributes:
        useful: Unlearned models that kept their utility.
        passed: Those of them that the metric takes for unlearned; robustness is theirs.
        published: R and Q.
        symmetric: R' and Q'.
        missing: Why numbers are missing; empty if none is.
    """

    faithfulness: float | None
    threshold: float | None
    useful: int
    passed: int
    published: Robustness
    symmetric: Robustness
    missing: Sequence[str] = field(default_factory=tuple)

    @property
    def overall(self) -> float | None:
        return harmonic_mean(self.faithfulness, self.published.both)

    @property
    def symmetric_overall(self) -> float | None:
        return harmonic_mean(self.faithfulness, self.symmetric.both)


def judge(
    knowing: Sequence[float | None],
    ignorant: Sequence[float | None],
    reference: Change,
    unlearned: Sequence[Tested],
    least_utility: float,
) -> Verdict:
    """All that is said about one metric.

    Args:
        knowing, ignorant: One value per model of P and of N.
        reference: Values of the reference before and after relearning.
        unlearned: Models that unlearned, those that could not be made included.
        least_utility: Share of the utility that a model must have kept to count.
    """
    limit = threshold(knowing, ignorant)
    useful = [one for one in unlearned if one.utility is not None and one.utility >= least_utility]
    passed = [
        one for one in useful
        if limit is not None and one.before is not None and one.before <= limit
    ]  # fmt: skip
    changes = [(one.before, one.quantized) for one in passed]
    return Verdict(
        faithfulness(knowing, ignorant),
        limit,
        len(useful),
        len(passed),
        Robustness(
            mean([relearning(reference, one.relearned) for one in passed]),
            mean([quantization(change) for change in changes]),
        ),
        Robustness(
            mean([symmetric_relearning(reference, one.relearned) for one in passed]),
            mean([symmetric_quantization(change) for change in changes]),
        ),
        tuple(_missing(knowing, ignorant, limit, reference, unlearned, useful, passed)),
    )


def _missing(
    knowing: Sequence[float | None],
    ignorant: Sequence[float | None],
    limit: float | None,
    reference: Change,
    unlearned: Sequence[Tested],
    useful: Sequence[Tested],
    passed: Sequence[Tested],
) -> list[str]:
    """Why a number is missing, or stands on fewer models than there should be."""
    found: list[str] = []
    for title, pool in (("P", knowing), ("N", ignorant)):
        if gone := sum(value is None for value in pool):
            found.append(f"{gone} of {len(pool)} models of {title} have no value")
    if mean(knowing) is None or mean(ignorant) is None:
        found.append("without values in both pools there is no threshold")
    elif limit is None:
        found.append("all models of P and N have the same value, so there is no threshold")
    if not unlearned:
        found.append("there is no unlearned model")
    elif gone := sum(one.utility is None for one in unlearned):
        found.append(f"{gone} of {len(unlearned)} unlearned models are missing or have no utility")
    if unlearned and not useful:
        found.append(f"none of {len(unlearned)} unlearned models kept enough utility")
    elif not passed and limit is not None:
        found.append(f"none of {len(useful)} useful models is at or below the threshold")
    if passed and None in reference:
        found.append("the reference has no value before and after relearning")
    for title, gone in (
        ("relearned", sum(None in one.relearned for one in passed)),
        ("quantized", sum(one.quantized is None for one in passed)),
    ):
        if gone:
            found.append(f"{gone} of {len(passed)} {title} models have no value")
    return found
