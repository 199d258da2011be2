"""The pictures of a leaderboard: forgetting against utility, and both from task to task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from delible.bench.table import REFERENCE, Number, Table, shown, value_of
from delible.measure.benchmark import Benchmark, Chart, Column, Curve
from delible.report import charts
from delible.report.board import kind_of, named
from delible.report.ranking import aim_of, axes_of, front
from delible.report.words import finite

#: More methods than these carry numbers instead of names in the chart.
MOST_NAMES = 16


def trade_off(table: Table) -> dict[str, Any] | None:
    """Forgetting against utility, drawn for wide and for narrow screens."""
    forget, utility = axes_of(table)
    if forget is None or utility is None:
        return None
    scales = [100.0 if column.percent else 1.0 for column in (forget, utility)]
    spots: list[charts.Spot] = []
    missing: list[str] = []
    y_line: float | None = None
    for row in table.rows:
        x, y = row.numbers[forget.key], row.numbers[utility.key]
        if not (finite(x.mean) and finite(y.mean)):
            missing.append(row.method)
            if row.method == REFERENCE and y.mean is not None and finite(y.mean):
                y_line = scales[1] * y.mean
            continue
        assert x.mean is not None
        assert y.mean is not None
        kind = kind_of(row.method)
        badge = str(1 + sum(spot.kind not in ("original", "reference") for spot in spots))
        spots.append(
            charts.Spot(
                scales[0] * x.mean,
                scales[1] * y.mean,
                kind,
                named(row.method),
                kind if kind in ("original", "reference") else badge,
                f"{named(row.method)}: {forget.title} {shown(x, forget)}, "
                f"{utility.title} {shown(y, utility)}",
                _interval(x, scales[0]),
                _interval(y, scales[1]),
            )
        )
    if len(spots) < 2:
        return None
    aim = aim_of(table, forget)
    drawn = [spot for spot in spots if spot.kind not in ("original", "reference")]
    numbered = len(drawn) > MOST_NAMES
    x_label = f"{forget.title}{', %' if forget.percent else ''}  ({_arrow(forget, aim)})"
    y_label = f"{utility.title}{', %' if utility.percent else ''}  (↑ higher is better)"
    svgs = [
        charts.methods(
            spots,
            identifier=f"trade-{name}",
            title=f"{forget.title} against {utility.title}",
            description="; ".join(spot.title for spot in spots),
            x_label=x_label,
            y_label=y_label,
            size=size,
            numbered=numbered or name == "narrow",
            x_line=None if aim is None else scales[0] * aim,
            y_line=y_line,
            from_zero=all(spot.x >= 0 for spot in spots) and forget.better != "higher",
        )
        for name, size in (("wide", (760.0, 470.0)), ("narrow", (400.0, 400.0)))
    ]
    return {
        "wide": svgs[0],
        "narrow": svgs[1],
        "key": [
            {
                "name": spot.name,
                "kind": spot.kind,
                "x": f"{spot.x:.{_digits(forget)}f}",
                "y": f"{spot.y:.{_digits(utility)}f}",
            }
            for spot in drawn
        ],
        "numbered": numbered,
        "kinds": list(dict.fromkeys(spot.kind for spot in spots)),
        "bars": any(spot.x_interval or spot.y_interval for spot in spots),
        "forget": forget,
        "utility": utility,
        "aim": aim,
        "missing": [named(name) for name in missing],
        "front": [named(name) for name in front(table)],
    }


def from_task_to_task(
    benchmark: Benchmark, table: Table, cells: Sequence[Mapping[str, Any]]
) -> list[Chart]:
    """Both axes over tasks that have an order: per method the mean over seeds at each task."""
    label = benchmark.along()
    found: list[Chart] = []
    for column in axes_of(table) if label is not None else ():
        if column is None:
            continue
        curves = []
        for row in table.rows:
            values: dict[int, list[float]] = {}
            for cell in cells:
                number, value = _last_number(str(cell["task"])), value_of(cell, column.key)
                if cell["method"] == row.method and number is not None and value is not None:
                    scaled = 100 * value if column.percent else value
                    values.setdefault(number, []).append(scaled)
            points = [(float(at), sum(here) / len(here)) for at, here in sorted(values.items())]
            curves.append(Curve(named(row.method), points))
        title = f"{column.title}{', %' if column.percent else ''}"
        if any(len(curve.points) > 1 for curve in curves):
            found.append(Chart(title, str(label), title, curves))
    return found


def _interval(number: Number, scale: float) -> tuple[float, float] | None:
    if number.low is None or number.high is None:
        return None
    ends = (scale * number.low, scale * number.high)
    return ends if all(map(finite, ends)) and ends[0] < ends[1] else None


def _last_number(name: str) -> int | None:
    found = re.search(r"(\d+)$", name)
    return None if found is None else int(found[1])


def _digits(column: Column) -> int:
    return 1 if column.percent else 3


def _arrow(column: Column, aim: float | None) -> str:
    if column.better == "lower":
        return "← lower is better"
    if column.better == "higher":
        return "higher is better →"
    return "nearest to the reference is best" if aim is not None else "best: unknown, no reference"
