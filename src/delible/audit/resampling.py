"""Means of several columns over records that are drawn again: the intervals of an audit.

Records of one fact are drawn together, and a record's values for all systems stay together, so
that the difference between two systems has the interval of a paired comparison.
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
