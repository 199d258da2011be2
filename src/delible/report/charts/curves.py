"""Lines over steps, with their names at their ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from delible.report.charts.drawing import Row, chart, draw, layer, number, own
from delible.report.charts.looks import BOLD, LEADER, MARKED, POINT, RULED, between, cut, look, text
from delible.report.charts.placing import Plane, domain, spaced
from delible.report.words import finite
from delible.report.words import number as written


@dataclass(frozen=True)
class Line:
    """One line of a line chart: ``ys[i]`` at ``xs[i]``, gaps where it is not a finite number."""

    label: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[float | None]


def thin(line: Line, most: int = 400) -> Line:
    """At most about ``most`` points: the lowest and the highest of every bucket, so spikes stay."""
    if len(line.xs) <= most:
        return line
    width = math.ceil(len(line.xs) * 2 / most)
    keep: set[int] = {len(line.xs) - 1}
    for start in range(0, len(line.xs), width):
        bucket = [
            index
            for index in range(start, min(start + width, len(line.xs)))
            if finite(line.ys[index])
        ]
        if bucket:
            keep.add(min(bucket, key=lambda index: line.ys[index] or 0.0))
            keep.add(max(bucket, key=lambda index: line.ys[index] or 0.0))
    order = sorted(keep)
    return replace(line, xs=[line.xs[i] for i in order], ys=[line.ys[i] for i in order])


def lines(
    series: Sequence[Line],
    *,
    identifier: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    named: bool = True,
) -> Markup | None:
    """Lines over steps; ``None`` when there is nothing finite to draw.

    Args:
        from_zero: The vertical axis starts at 0 (or lower).
        named: Names stand at the ends of the lines.
    """
    kept = [thin(line) for line in series if any(finite(y) for y in line.ys)]
    if not kept:
        return None
    longest = max(len(cut(line.label)) for line in kept)
    margin = max(88.0, 8.2 * longest + 14) if named else 16.0
    places = [
        (float(x), float(y))
        for line in kept
        for x, y in zip(line.xs, line.ys, strict=True)
        if y is not None and finite(y)
    ]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    plane = Plane(
        320.0 + (0.0 if named else 72.0),
        192.0 + 15.0 * max(0, len(kept) - 10) * named,
        (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1),
        domain(ys, from_zero=from_zero),
    )
    rows, marks = [], []
    for index, line in enumerate(kept):
        looks = {**look(line.kind), "line": index}
        few = sum(finite(y) for y in line.ys) <= 24
        for x, y in zip(line.xs, line.ys, strict=True):
            value = float(y) if y is not None and finite(y) else None
            rows.append({"x": float(x), "y": value, "title": line.label, **looks})
            if few and value is not None:
                said = f"{line.label}, {x:g}: {written(value)}"
                marks.append({"x": float(x), "y": value, "title": said, **looks})
    leaders, names = _ends(kept, plane) if named else ([], [])
    counted = {"tickMinStep": 1} if all(x == round(x) for x in xs) else {}
    spec = chart(
        (plane.width, plane.height),
        (32, margin, 46, 52),
        number("x", plane.x_range, x_label, **counted),
        number("y", plane.y_range, y_label),
        [
            layer("lines", {"type": "line", "strokeWidth": 2, "strokeCap": "round",
                            "strokeJoin": "round", "invalid": "break-paths-show-path-domains"},
                  rows, detail=own("line"), color=own("tone"), strokeDash=own("dash")),
            layer("points", POINT, marks, **MARKED),
            layer("leaders", LEADER, leaders, color=own("tone"), **RULED),
            layer("names", {**BOLD, "align": "left"}, names, text=own("text"), color=own("tone")),
        ],
    )  # fmt: skip
    return draw(spec, identifier=identifier, title=title, description=description)


def _ends(kept: Sequence[Line], plane: Plane) -> tuple[Sequence[Row], Sequence[Row]]:
    """Names beside the last points of lines, apart from each other; lines to those far away."""
    ends = []
    for line in kept:
        last = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if finite(y)][-1]
        assert last[1] is not None
        ends.append((plane.pixel(last[0], last[1]), line))
    ends.sort(key=lambda end: (end[0][1], end[1].label))
    heights = spaced([place[1] for place, _ in ends], 15.0, 0.0, plane.height)
    leaders, names = [], []
    for ((x, y), line), height in zip(ends, heights, strict=True):
        looks = look(line.kind)
        if plane.width - x > 12 or abs(height - y) > 6:
            to = plane.numbers(plane.width + 6, height)
            leaders.append({**between(plane.numbers(x + 4, y), to), **looks})
        at = (plane.width + 9, height)
        names.append({**text(plane, at, cut(line.label)), "title": line.label, **looks})
    return leaders, names
