"""One mark per system or method: forgetting against utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from delible.report.charts.drawing import Row, chart, draw, layer, number, own
from delible.report.charts.looks import (
    BOLD,
    LEADER,
    LETTER,
    MARKED,
    POINT,
    RULED,
    SOFT,
    between,
    cut,
    look,
    text,
)
from delible.report.charts.placing import (
    Anchor,
    Box,
    Place,
    Plane,
    along,
    beside,
    domain,
    leader,
    within,
)

#: What everything is compared with: larger, and below, so that it hides nobody.
BASELINES = ("original", "reference")


@dataclass(frozen=True)
class Point:
    """One mark of a scatter chart.

    Attributes:
        kind: Its look: original (square), reference (diamond), else a circle.
        badge: Short text beside the mark.
        small: A smaller mark (an attacked version).
    """

    x: float
    y: float
    kind: str
    badge: str
    title: str
    small: bool = False


@dataclass(frozen=True)
class Spot:
    """One method in a chart of many.

    Attributes:
        kind: Its look: original (square), reference (diamond), editor (triangle), guard (ring),
            else a circle.
        badge: Short text that stands for the name where there is little room.
        x_interval, y_interval: Low and high ends of error bars.
    """

    x: float
    y: float
    kind: str
    name: str
    badge: str
    title: str
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


def scatter(
    points: Sequence[Point],
    *,
    identifier: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    ideal: tuple[float, float] | None = None,
    include_y: Sequence[float] = (),
) -> Markup:
    """Forgetting (x, lower is better) against utility (y, higher is better).

    Args:
        ideal: ``(x, y)``: the zone left of x and above y is shaded and named.
        include_y: Values that the vertical axis must reach (so that it does not zoom too far in).
    """
    aim = [] if ideal is None else [ideal]
    xs = [*(point.x for point in points), *(x for x, _ in aim)]
    ys = [*(point.y for point in points), *include_y, *(y for _, y in aim)]
    plane = Plane(486, 338, domain(xs, from_zero=True), domain(ys))
    plain = {point.kind: point for point in points if not point.small}
    start, end = plain.get("original"), plain.get("unlearned")
    lines = [
        between((end.x, end.y), (point.x, point.y))
        for point in points
        if end is not None and point.small and point.kind == "unlearned"
    ]
    way = _way(plane, start, end) if start is not None and end is not None else []
    # attacked versions are drawn first (below), names of the large marks are placed first
    drawn = sorted(points, key=lambda point: not point.small)
    named = sorted(points, key=lambda point: point.small)
    anchors = [
        Anchor(*plane.pixel(point.x, point.y), 4.5 if point.small else 7.5, point.badge)
        for point in named
    ]
    avoid = [
        place
        for row in [*lines, *way]
        for place in along(plane.pixel(row["x"], row["y"]), plane.pixel(row["x2"], row["y2"]))
    ]
    zone, zone_name = [], []
    for x, y in aim:
        right, bottom = plane.pixel(x, y)
        zone.append(between(plane.numbers(0, 0), plane.numbers(max(right, 3), bottom)))
        left, top = max(right, 3) + 7, 11.0
        avoid += along((left, top - 4), (left + 48, top - 4), 16)
        zone_name.append(text(plane, (left, top), "← the aim"))
    middles = beside(anchors, (0, 0, plane.width + 22, plane.height), avoid)
    spec = chart(
        (plane.width, plane.height),
        (34, 22, 48, 52),
        number("x", plane.x_range, x_label),
        number("y", plane.y_range, y_label),
        [
            layer("ideal", {"type": "rect", "color": "var(--ideal)"}, zone, **RULED),
            layer("leaders", {**LEADER, "color": "var(--unlearned)"}, lines, **RULED),
            layer("way", {"type": "rule", "strokeWidth": 1.6, "color": "var(--strong-rule)"},
                  way, **RULED),
            layer("tip", {"type": "point", "filled": True, "size": 60, "opacity": 1,
                          "shape": "triangle-up", "color": "var(--strong-rule)"},
                  [{"x": row["x2"], "y": row["y2"], "angle": row["angle"]} for row in way],
                  angle=own("angle")),
            layer("points", POINT, [
                {"x": point.x, "y": point.y, "title": point.title,
                 **look(point.kind, 4.5 if point.small else 7.5, ring=point.small)}
                for point in drawn
            ], **MARKED),
            layer("zone", {**SOFT, "align": "left", "baseline": "alphabetic"}, zone_name,
                  text=own("text")),
            *(
                layer(name, {**BOLD, "fontSize": size}, [
                    {**text(plane, middle, point.badge), **look(point.kind)}
                    for point, middle in zip(named, middles, strict=True) if point.small is small
                ], text=own("text"), color=own("tone"))
                for name, size, small in (("names", 12.5, False), ("numbers", 11.5, True))
            ),
        ],
    )  # fmt: skip
    return draw(spec, identifier=identifier, title=title, description=description)


def _way(plane: Plane, start: Point, end: Point) -> list[dict[str, Any]]:
    """The arrow between two marks, with room before both; nothing where they are close."""
    (x1, y1), (x2, y2) = plane.pixel(start.x, start.y), plane.pixel(end.x, end.y)
    length = math.hypot(x2 - x1, y2 - y1)
    if length <= 40:
        return []
    right, down = (x2 - x1) / length, (y2 - y1) / length
    tail = plane.numbers(x1 + 13 * right, y1 + 13 * down)
    tip = plane.numbers(x2 - 13 * right, y2 - 13 * down)
    return [{**between(tail, tip), "angle": math.degrees(math.atan2(right, -down))}]


def _error_bars(
    spots: Sequence[Spot], plane: Plane
) -> tuple[list[Row], list[dict[str, Any]], list[Place]]:
    """Lines over intervals, caps at the ends that lie inside of the frame, places to avoid."""
    bars: list[Row] = []
    caps: list[dict[str, Any]] = []
    avoid: list[Place] = []
    for spot in spots:
        for interval, limits, upright in (
            (spot.x_interval, plane.x_range, False),
            (spot.y_interval, plane.y_range, True),
        ):
            if interval is None:
                continue
            shown = [min(max(end, limits[0]), limits[1]) for end in interval]
            low, high = ((spot.x, end) if upright else (end, spot.y) for end in shown)
            bars.append(between(low, high))
            avoid += along(plane.pixel(*low), plane.pixel(*high), 12)
            caps += [
                {"x": place[0], "y": place[1], "orient": "horizontal" if upright else "vertical"}
                for value, end, place in zip(interval, shown, (low, high), strict=True)
                if value == end
            ]
    return bars, caps, avoid


def methods(
    spots: Sequence[Spot],
    *,
    identifier: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = (760.0, 470.0),
    numbered: bool = False,
    x_line: float | None = None,
    y_line: float | None = None,
    y_text: str = "the reference’s utility",
    from_zero: bool = False,
) -> Markup:
    """Many methods: forgetting (x) against utility (y), each with its error bars.

    Args:
        size: Of the whole, in pixels.
        numbered: Methods carry their badges instead of their names.
        x_line: A vertical line at the reference's value, where a method is best.
        y_line: A horizontal line, such as the utility of a reference that has no x.
        y_text: What the horizontal line is.
        from_zero: The horizontal axis starts at 0.
    """
    margins = (38.0, 22.0, 48.0, 52.0)
    width, height = size[0] - margins[1] - margins[3], size[1] - margins[0] - margins[2]
    xs = [*(spot.x for spot in spots), *([x_line] if x_line is not None else [])]
    ys = [*(spot.y for spot in spots), *([y_line] if y_line is not None else [])]
    x_ends = [end for spot in spots if spot.x_interval for end in spot.x_interval]
    y_ends = [end for spot in spots if spot.y_interval for end in spot.y_interval]
    plane = Plane(
        width,
        height,
        domain([*xs, *within(xs, x_ends)], from_zero=from_zero),
        domain([*ys, *within(ys, y_ends)]),
    )
    bars, caps, avoid = _error_bars(spots, plane)
    taken: list[Box] = []
    aims: list[Row] = []
    told: list[dict[str, Any]] = []
    if x_line is not None:
        x = plane.pixel(x_line, 0)[0]
        starts = x < width * 0.7
        edge = x + (6 if starts else -6)
        aims.append(between((x_line, plane.y_range[0]), (x_line, plane.y_range[1])))
        said = text(plane, (edge, 4), "best: as the reference")
        told.append({**said, "align": "left" if starts else "right"})
        avoid += along((x, 0), (x, height))
        taken.append((edge - 140 * (not starts), -8, edge + 140 * starts, 8))
    if y_line is not None:
        y = plane.pixel(0, y_line)[1]
        aims.append(between((plane.x_range[0], y_line), (plane.x_range[1], y_line)))
        told.append({**text(plane, (width, y - 6), y_text), "align": "right"})
        avoid += along((0, y), (width, y), 90)
        taken.append((width - 150, y - 18, width, y - 2))
    order = sorted(spots, key=lambda spot: spot.kind not in BASELINES)
    anchors = [
        Anchor(*plane.pixel(spot.x, spot.y), 7.0, spot.badge if numbered else cut(spot.name))
        for spot in order
    ]
    middles = beside(
        anchors, (0, 0, width + margins[1], height), avoid, taken=taken, letter=LETTER,
        distances=(3.0, 12.0, 24.0, 38.0, 54.0, 72.0, 96.0), overlap=12.0,
    )  # fmt: skip
    lines = [
        between(plane.numbers(anchor.x, anchor.y), plane.numbers(*near))
        for anchor, middle in zip(anchors, middles, strict=True)
        if (near := leader(anchor, middle, letter=LETTER, least=24)) is not None
    ]
    error = {"color": "var(--unlearned)", "opacity": 0.42}
    aim = {"color": "var(--ideal-ink)", "strokeWidth": 1.4, "strokeDash": [6, 5]}
    spec = chart(
        (width, height),
        margins,
        number("x", plane.x_range, x_label),
        number("y", plane.y_range, y_label),
        [
            layer("aims", {"type": "rule", **aim}, aims, **RULED),
            *(
                layer(f"{side}_aim_names", {**SOFT, "align": side, "baseline": "alphabetic"},
                      [row for row in told if row["align"] == side], text=own("text"))
                for side in ("left", "right")
            ),
            layer("errors", {"type": "rule", "strokeWidth": 1.2, **error}, bars, **RULED),
            *(
                layer(f"{way}_caps", {"type": "tick", "size": 6, "thickness": 1.2, **error,
                                      "orient": way},
                      [row for row in caps if row["orient"] == way])
                for way in ("vertical", "horizontal")
            ),
            layer("points", POINT, [
                {"x": spot.x, "y": spot.y, "title": spot.title,
                 **look(spot.kind, 8.5 if spot.kind in BASELINES else 5.5)}
                for spot in order
            ], **MARKED),
            layer("leaders", {**LEADER, "color": "var(--unlearned)"}, lines, **RULED),
            layer("names", BOLD, [
                {**text(plane, middle, anchor.text), "title": spot.title, **look(spot.kind)}
                for spot, anchor, middle in zip(order, anchors, middles, strict=True)
                if anchor.text
            ], text=own("text"), color=own("tone")),
        ],
    )  # fmt: skip
    return draw(spec, identifier=identifier, title=title, description=description)
