"""Linear connectivity: does a model stay as good on the straight line between two of them?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from delible.component import build
from delible.experiments.coreset.row import METRIC
from delible.lm.between import interpolated
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.records import RecordBase

#: Two models are connected when no point between them is this much worse (ours).
CONNECTED = 0.02


def linear_connectivity(
    first: LM, second: LM, splits: Mapping[str, Sequence[RecordBase]], points: int = 11
) -> dict[str, list[float]]:
    """Mean answer probability per split at equally spaced points from ``first`` to ``second``."""
    line: dict[str, list[float]] = {name: [] for name in splits}
    for point in range(points):
        lm = interpolated(first, second, point / (points - 1))
        means = evaluate(lm, splits, [build("metric", METRIC)]).means[METRIC]
        for name in splits:
            value = means[name]
            line[name].append(math.nan if value is None else value)
    return line


def barrier(values: Sequence[float]) -> float:
    """Largest dip below the straight line between the ends, at equally spaced points.

    Args:
        values: A metric of which more is better; the first and the last are the ends'.

    Returns:
        0 or more; at most :data:`CONNECTED` = linearly connected.
    """
    last = len(values) - 1
    dips = (
        ((last - i) * values[0] + i * values[-1]) / last - value for i, value in enumerate(values)
    )
    return max(0.0, *dips)  # the ends' own is 0, but for rounding
