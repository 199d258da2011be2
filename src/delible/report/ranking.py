"""Which method is best in a column of a leaderboard, and which ones nobody beats in both axes.

Only means are compared; the original and the reference are what methods are compared with, and
take no part. In a column that is best at the reference's value the distance to it counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from delible.bench.table import ORIGINAL, REFERENCE, Number, Table, TableRow
from delible.measure.benchmark import Axis, Column

#: Rows that are no methods.
BASELINES = (ORIGINAL, REFERENCE)
#: ``level``: its interval overlaps with the best one's.
Place = Literal["best", "level"]


@dataclass(frozen=True)
class Loss:
    """How far from perfect: lower is better.

    Attributes:
        mean: Of the mean.
        least, most: Over the interval; equal to ``mean`` where there is none.
    """

    mean: float
    least: float
    most: float


def row_of(table: Table, method: str) -> TableRow | None:
    """The row of that name."""
    return next((row for row in table.rows if row.method == method), None)


def methods_of(table: Table) -> list[TableRow]:
    """All rows but the original and the reference."""
    return [row for row in table.rows if row.method not in BASELINES]


def axis_of(table: Table, axis: Axis) -> Column | None:
    """The column of that axis."""
    return next((column for column in table.columns if column.axis == axis), None)


def axes_of(table: Table) -> tuple[Column | None, Column | None]:
    """The column of forgetting and that of utility."""
    return axis_of(table, "forget"), axis_of(table, "utility")


def aim_of(table: Table, column: Column) -> float | None:
    """The reference's value, where that is what a method should have."""
    row = row_of(table, REFERENCE)
    if column.better != "reference" or row is None:
        return None
    mean = row.numbers[column.key].mean
    return mean if mean is not None and math.isfinite(mean) else None


def loss(number: Number, column: Column, aim: float | None) -> Loss | None:
    """How far a number is from perfect.

    Args:
        aim: The reference's value, for columns that are best there.

    Returns:
        ``None`` where that cannot be said: no value, or no reference to be near to.
    """
    if number.mean is None or not math.isfinite(number.mean):
        return None
    low = number.mean if number.low is None else number.low
    high = number.mean if number.high is None else number.high
    if column.better == "lower":
        return Loss(number.mean, low, high)
    if column.better == "higher":
        return Loss(-number.mean, -high, -low)
    if aim is None:
        return None
    ends = (abs(low - aim), abs(high - aim))
    return Loss(abs(number.mean - aim), 0.0 if low <= aim <= high else min(ends), max(ends))


def places(table: Table) -> dict[tuple[str, str], Place]:
    """The best methods by (method, column's key), and those that are level with them.

    A column with a single method in it has no best.
    """
    found: dict[tuple[str, str], Place] = {}
    for column in table.columns:
        aim = aim_of(table, column)
        losses = {
            row.method: one
            for row in methods_of(table)
            if (one := loss(row.numbers[column.key], column, aim)) is not None
        }
        if len(losses) < 2:
            continue
        least = min(one.mean for one in losses.values())
        best = {name: one for name, one in losses.items() if one.mean == least}
        reach = max(one.most for one in best.values())
        for name, one in losses.items():
            if name in best:
                found[name, column.key] = "best"
            elif one.least < one.mean and one.least <= reach:
                found[name, column.key] = "level"
    return found


def front(table: Table) -> list[str]:
    """Methods that no other method beats in forgetting without losing to it in utility."""
    columns = axes_of(table)
    found: dict[str, tuple[float, ...]] = {}
    for row in methods_of(table):
        losses = [
            loss(row.numbers[column.key], column, aim_of(table, column))
            for column in columns
            if column is not None
        ]
        known = tuple(one.mean for one in losses if one is not None)
        if len(known) == len(columns):
            found[row.method] = known
    return [
        name
        for name, mine in found.items()
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in found.values()
        )
    ]
