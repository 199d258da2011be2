"""How numbers of runs become a verdict about a claim: intervals, and one rule.

A claim says in which range a number lies. It shows when the whole 95 % interval lies there, does
not show when all of it lies outside, and cannot be told otherwise. The interval covers two:
Student's over the seeds, and the percentile bootstrap over the records of the mean over seeds,
where the number is made of records. (Seeds alone say nothing about other questions: a
method whose rows fit in one batch does the same under every seed. Records alone say nothing about
another run.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from delible.bench.stages import mean
from delible.bench.table import Number, mean_of_runs
from delible.measure.scoring.separation import area_under_curve

INFINITE = math.inf
RESAMPLES = 500
#: 97.5 % quantile of the normal distribution.
NORMAL = 1.959964
Run = Mapping[str, Any]
#: Chooses records of a list of values: all, or drawn with replacement, alike for equal lengths.
Pick = Callable[[Sequence[float | None]], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Entry:
    """The runs of one experiment on one model.

    Attributes:
        runs: One mapping per run; lists are values of records.
        seeds: Runs were made with seeds 0, 1, …
    """

    runs: Sequence[Run]
    seeds: int

    def one(self, seed: int | None = None, **wanted: Any) -> Run | None:
        """The run with these values; without a seed, the one of the first."""
        for run in self.runs:
            if all(run.get(key) == value for key, value in wanted.items()) and (
                seed is None or run.get("seed") == seed
            ):
                return run
        return None


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the number that would show it.

    Attributes:
        measured: What the number is, in words.
        low, high: The range in which it would lie; the ends do not belong to it.
        number: Of a model's runs; a mean of None: not run.
    """

    says: str
    measured: str
    low: float
    high: float
    number: Callable[[Entry], Number]
    digits: int = 2

    def range_text(self) -> str:
        """The range in words."""
        if self.high == INFINITE:
            return f"above {self.low:g}"
        if self.low == -INFINITE:
            return f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


def verdict(claim: Claim, number: Number) -> str:
    """What the runs say of a claim: shows, does not show, cannot be told, or not run."""
    if number.mean is None:
        return "not run"
    if number.low is None or number.high is None:
        return "cannot be told (no interval)"
    if claim.low < number.low and number.high < claim.high:
        return "shows"
    if number.high <= claim.low or claim.high <= number.low:
        return "**does not show**"
    return "cannot be told"


def interval(number: Number, digits: int) -> str:
    """A number with its interval as text."""
    if number.mean is None:
        return "–"
    mean = f"{number.mean:.{digits}f}"
    if number.low is None or number.high is None:
        return mean
    return f"{mean} ({number.low:.{digits}f} to {number.high:.{digits}f})"


# ---- numbers with their intervals


def all_of(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    """Every record once; NaN where there is no value."""
    return np.asarray([math.nan if value is None else value for value in values], np.float64)


def drawn(generator: np.random.Generator) -> Pick:
    """Records with replacement; lists of one length, which are the same records, alike."""
    places: dict[int, npt.NDArray[np.int64]] = {}

    def pick(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
        size = len(values)
        if size not in places:
            places[size] = generator.integers(size, size=size)
        return all_of(values)[places[size]]

    return pick


def over_seeds(value: Callable[[Entry, int], float | None]) -> Callable[[Entry], Number]:
    """The mean of a number per seed, with Student's interval where there are several.

    Without an interval where all seeds give one value: what did not vary says nothing about how
    far it would.
    """

    def number(entry: Entry) -> Number:
        found = mean_of_runs([value(entry, seed) for seed in range(entry.seeds)])
        return found if found.low != found.high else Number(found.mean, runs=found.runs)

    return number


def over_records(value: Callable[[Entry, int, Pick], float | None]) -> Callable[[Entry], Number]:
    """The mean of a number per seed; the interval covers that over seeds and that over records."""

    def number(entry: Entry) -> Number:
        def values(pick: Pick) -> list[float | None]:
            return [value(entry, seed, pick) for seed in range(entry.seeds)]

        found = mean_of_runs(values(all_of))
        if found.mean is None:
            return found
        generator = np.random.default_rng(0)
        means = [mean(values(drawn(generator))) for _ in range(RESAMPLES)]
        known = [one for one in means if one is not None]
        if len(known) < RESAMPLES / 2:  # a ratio whose divisor is often nothing
            return found
        low, high = (float(end) for end in np.quantile(known, [0.025, 0.975]))
        if found.low is None or found.high is None:
            return Number(found.mean, low, high, found.runs)
        return Number(found.mean, min(low, found.low), max(high, found.high), found.runs)

    return number


def shares_apart(one: Sequence[bool], other: Sequence[bool]) -> Number:
    """A share of runs minus another's, with Newcombe's interval.

    It is put together from Wilson's intervals of both, so that it has a width where all runs
    agree (Newcombe, Statistics in Medicine 1998, method 10).
    """
    if not one or not other:
        return Number(None)
    (first, low, high), (second, least, most) = map(_wilson, (one, other))
    return Number(
        first - second,
        first - second - math.hypot(first - low, most - second),
        first - second + math.hypot(high - first, second - least),
        len(one) + len(other),
    )


def _wilson(runs: Sequence[bool]) -> tuple[float, float, float]:
    """A share, and its 95 % score interval."""
    count, share, z = len(runs), sum(runs) / len(runs), NORMAL
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return share, middle - half, middle + half


def area(larger: Sequence[float | None], smaller: Sequence[float | None]) -> Number:
    """Area under the curve with Newcombe's score interval, which has a width at 0 and 1 too.

    The ends solve (A - seen)² = z² V(A), with V the variance by Hanley and McNeil in which both
    group sizes are their mean (Newcombe, Statistics in Medicine 2006, method 5).
    """
    high = [value for value in larger if value is not None]
    low = [value for value in smaller if value is not None]
    seen = area_under_curve(low, high)
    if seen is None:
        return Number(None)
    middle = (len(high) + len(low)) / 2

    def misses(true: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        extra = (middle - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * (1 + extra) / (len(high) * len(low))
        return np.asarray((true - seen) ** 2 <= NORMAL**2 * variance)

    grid = np.linspace(0, 1, 10_001)
    inside = grid[misses(grid)]
    ends = [*inside.tolist(), seen]
    return Number(seen, min(ends), max(ends), len(high) + len(low))
