"""How long a coreset trains: as many updates as the full set, or the shortest time that forgets as
much, on a geometric grid of epochs from short to long."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from delible.experiments.coreset.row import CoresetRow

#: How long a coreset trains.
Length = Literal["equal updates", "shortest"]


def share_of_effect(start: float, full: float, part: float) -> float | None:
    """(start - part) / (start - full): 1 = as much forgotten as with the full set, 0 = nothing.

    Args:
        start, full, part: Forget probabilities before, after the full set, after a part or a
            variant of it.

    Returns:
        None when the full set changed nothing.
    """
    return (start - part) / (start - full) if start != full else None


def epochs_grid(full: float, share: float, points: int) -> list[int]:
    """Numbers of epochs from the full set's to that divided by the share, equal ratios apart.

    Args:
        full: Epochs of the full set.
        share: Of the rows, in (0, 1].
        points: At least 2, the ends; equal whole numbers count once.
    """
    low, high = (math.ceil(round(value, 6)) for value in (full, full / share))
    ratio = high / low
    return sorted({round(low * ratio ** (point / (points - 1))) for point in range(points)})


def shortest(
    runs: Iterable[CoresetRow], start: CoresetRow, full: CoresetRow, least_effect: float
) -> CoresetRow:
    """The first run with enough of the full set's effect; without one, that with most of it.

    Args:
        runs: From short to long, not empty; made one by one, and none after the one that is
            enough.
        start, full: The rows before, and after the full set. If that forgot nothing there is no
            effect to reach, and the first run is taken.
    """
    before, after = start.forget_probability, full.forget_probability
    runs = iter(runs)
    if before is None or after is None or not after < before:
        return next(runs)
    tried: list[tuple[float, CoresetRow]] = []
    for row in runs:
        part = row.forget_probability
        effect = share_of_effect(before, after, part) if part is not None else None
        effect = -math.inf if effect is None or math.isnan(effect) else effect
        if effect >= least_effect:
            return replace(row, reached=True)
        tried.append((effect, row))
    return replace(max(tried, key=lambda pair: pair[0])[1], reached=False)
