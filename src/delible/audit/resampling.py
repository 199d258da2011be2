"""Means of several columns over records that are drawn again: the intervals of an audit.

Records of one fact are drawn together, and a record's values for all systems stay together, so
that the difference between two systems has the interval of a paired comparison.

Where all records are alike, drawing them again shows no spread, however few they are. What so few
cannot show is then added: of n facts that are alike, Wilson's interval leaves room for a share of
z^2 / (n + z^2) of another kind (E. B. Wilson, 1927).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

Array = npt.NDArray[np.float64]

RESAMPLES = 1000
#: With fewer records than this no interval is given: it would be as wide as what was seen.
FEWEST_RECORDS = 3
#: Two-sided 95 % of a normal distribution.
Z = 1.959963984540054


def resampled_means(
    columns: Float[np.ndarray, "column record"], groups: Sequence[int] | None, seed: int
) -> Float[np.ndarray, "resample column"]:
    """Column means over resampled records.

    Args:
        columns: One row per system, one column per record.
        groups: Records with the same number are drawn together; None: each for itself.
        seed: The same seed and shape give the same draws.
    """
    records = columns.shape[1]
    labels = np.arange(records) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(labels.max()) + 1
    sums = np.zeros((columns.shape[0], count))
    for row, column in zip(sums, columns, strict=True):
        np.add.at(row, labels, column)
    sizes = np.bincount(labels, minlength=count)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    means: Array = (sums[:, drawn].sum(axis=2) / sizes[drawn].sum(axis=1)).T
    return means


def percentiles(values: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def widened(
    value: float, interval: tuple[float, float], facts: int, columns: Float[np.ndarray, "column n"]
) -> tuple[float, float]:
    """An interval of a share in [0, 1] that holds its value, and what so few facts cannot show.

    Resampling is trusted only where values differ by degrees and the draws did.

    Args:
        interval: From resampling.
        facts: How many there are.
        columns: The records' values that the share was computed from.
    """
    low, high = min(interval[0], value), max(interval[1], value)
    if high - low > 1e-9 and not np.isin(columns, (0.0, 1.0)).all():
        return low, high
    unseen = Z**2 / (facts + Z**2)
    return min(low, (1 - unseen) * value), max(high, 1 - (1 - unseen) * (1 - value))
