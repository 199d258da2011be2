"""Charts as inline SVG: small pure functions from numbers to markup, no drawing library.

Colours, fonts and line styles are CSS classes of ``style.css`` (so the charts follow light, dark
and print); every chart carries a title and a description, and systems differ in shape and dash
as well as in colour. Text is escaped here; values that are missing or not finite leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Number = float | None
#: The shape of a mark by its kind; what is not here is a circle.
SHAPES = {
    "original": "square", "reference": "diamond", "editor": "triangle",
    "series1": "square", "series2": "triangle", "series3": "diamond", "series4": "turned",
    "series6": "square", "series7": "triangle",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One mark of a scatter chart.

    Attributes:
        kind: CSS class and shape: original (square), reference (diamond), else a circle.
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
        kind: CSS class and shape: original (square), reference (diamond), editor (triangle),
            guard (ring), else a circle.
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


@dataclass(frozen=True)
class Line:
    """One line of a line chart: ``ys[i]`` at ``xs[i]``, gaps where it is not a finite number."""

    label: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[Number]


@dataclass(frozen=True)
class Bar:
    """One stacked bar: shares in [0, 1] by class."""

    label: str
    shares: Mapping[str, float]


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5, 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def domain(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """An axis range around the values; stays inside [0, 1] when they all do."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    margin = (high - low) * 0.08 or max(abs(high) * 0.1, 0.05)
    inside = min(values) >= 0 and max(values) <= 1
    bottom, top = (low if from_zero and low == 0 else low - margin), high + margin
    return (max(0.0, bottom), min(1.0, top)) if inside else (bottom, top)


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
    return Line(line.label, line.kind, [line.xs[i] for i in order], [line.ys[i] for i in order])


def _short(value: float) -> str:
    """A tick label."""
    if value == 0:
        return "0"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2g}".replace("e-0", "e-")


def _mark(kind: str, x: float, y: float, size: float, title: str = "", extra: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    style = f'class="mark {escape(kind)} {extra}"'
    words = kind.split()
    shape = next((SHAPES[word] for word in words if word in SHAPES), "circle")
    if shape == "square":
        return (
            f'<rect {style} x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" '
            f'height="{2 * size:.1f}">{tip}</rect>'
        )
    if shape in ("triangle", "turned"):
        reach = size * (1.25 if shape == "triangle" else -1.25)
        return (
            f'<path {style} d="M{x:.1f} {y - reach:.1f}l{reach:.1f} {1.8 * reach:.1f}'
            f'h{-2 * reach:.1f}z">{tip}</path>'
        )
    if shape == "diamond":
        reach = size * 1.35
        return (
            f'<path {style} d="M{x:.1f} {y - reach:.1f}l{reach:.1f} {reach:.1f}'
            f'l{-reach:.1f} {reach:.1f}l{-reach:.1f} {-reach:.1f}z">{tip}</path>'
        )
    return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}">{tip}</circle>'


class _Frame:
    """Axes, grid and the mapping from numbers to places."""

    def __init__(
        self,
        size: tuple[float, float],
        margins: tuple[float, float, float, float],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ) -> None:
        self.width, self.height = size
        self.top, right, bottom, self.left = margins
        self.right, self.bottom = self.width - right, self.height - bottom
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / ((high - low) or 1.0) * (self.bottom - self.top)

    def axes(self, x_label: str, y_label: str, *, counted: bool = False) -> str:
        """The axes; with ``counted`` the horizontal one has marks at whole numbers only."""
        parts: list[str] = []
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{_short(value)}</text>"
            )
        for value in ticks(*self.x_range):
            if counted and value != round(value):
                continue
            x = self.x(value)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.bottom}" '
                f'y2="{self.bottom + 4}"/>'
                f'<text class="tick" x="{x:.1f}" y="{self.bottom + 19}" text-anchor="middle">'
                f"{_short(value)}</text>"
            )
        parts.append(
            f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" '
            f'y2="{self.bottom}"/>'
            f'<text class="label" x="{(self.left + self.right) / 2:.1f}" y="{self.height - 6}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" x="{self.left}" y="15" text-anchor="start">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)


def _svg(
    identifier: str, size: tuple[float, float], title: str, description: str, body: str
) -> Markup:
    name = escape(identifier)
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {size[0]:g} {size[1]:g}" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}'
        f'</title><desc id="{name}-text">{escape(description)}</desc>{body}</svg>'
    )


def _place(
    anchors: Sequence[tuple[float, float, float, str]],
    frame: _Frame,
    avoid: Sequence[tuple[float, float]],
    *,
    taken: Sequence[tuple[float, float, float, float]] = (),
    distances: Sequence[float] = (4.0, 16.0, 30.0),
    character: float = 8.4,
    overlap: float = 3.0,
) -> list[tuple[float, float, str]]:
    """A free place beside every mark for its text: the best of several offsets.

    Args:
        anchors: ``(x, y, radius, text)`` of the marks.
        avoid: Points on lines and texts that a label should not cover.
        taken: Boxes (left, top, right, bottom) where other texts stand.
        distances: From the mark, to be tried.
        character: Width of a letter.
        overlap: How bad it is to cover a mark or another label.
    """
    boxes = [*((x - r, y - r, x + r, y + r) for x, y, r, _ in anchors), *taken]
    placed: list[tuple[float, float, str]] = []
    for x, y, radius, text in anchors:
        width, height = character * len(text) + 4, 15.0
        best: tuple[float, float, float] | None = None
        for distance in distances:
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                cx = x + dx * (radius + distance + width / 2)
                cy = y + dy * (radius + distance * 0.6 + height / 2)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = (
                    box[0] < frame.left
                    or box[2] > frame.width
                    or box[1] < frame.top
                    or box[3] > frame.bottom
                )
                hits = sum(
                    box[0] < other[2]
                    and other[0] < box[2]
                    and box[1] < other[3]
                    and other[1] < box[3]
                    for other in boxes
                )
                crossed = sum(
                    box[0] - 2 < px < box[2] + 2 and box[1] - 1 < py < box[3] + 1
                    for px, py in avoid
                )
                badness = overlap * hits + 10.0 * outside + 0.25 * crossed + distance / 40
                if best is None or badness < best[0]:
                    best = (badness, cx, cy)
        assert best is not None
        _, cx, cy = best
        boxes.append((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
        placed.append((cx, cy, text))
    return placed


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
    size = (560.0, 420.0)
    xs, ys = [point.x for point in points], [*(point.y for point in points), *include_y]
    if ideal is not None:
        xs, ys = [*xs, ideal[0]], [*ys, ideal[1]]
    low, high = domain(ys)
    frame = _Frame(size, (34, 22, 48, 52), domain(xs, from_zero=True), (low, high))
    parts: list[str] = []
    avoid: list[tuple[float, float]] = []

    def trace(start: tuple[float, float], end: tuple[float, float]) -> None:
        """Keeps labels off a line."""
        avoid.extend(
            (start[0] + (end[0] - start[0]) * t / 60, start[1] + (end[1] - start[1]) * t / 60)
            for t in range(61)
        )

    if ideal is not None:
        right, bottom = frame.x(ideal[0]), frame.y(ideal[1])
        parts.append(
            f'<rect class="ideal" x="{frame.left}" y="{frame.top}" '
            f'width="{max(right - frame.left, 3):.1f}" height="{bottom - frame.top:.1f}"/>'
        )
    parts.append(frame.axes(x_label, y_label))
    plain = {point.kind: point for point in points if not point.small}
    start, end = plain.get("original"), plain.get("unlearned")
    for point in points:
        if point.small and end is not None and point.kind == "unlearned":
            trace((frame.x(end.x), frame.y(end.y)), (frame.x(point.x), frame.y(point.y)))
            parts.append(
                f'<line class="leader" x1="{frame.x(end.x):.1f}" y1="{frame.y(end.y):.1f}" '
                f'x2="{frame.x(point.x):.1f}" y2="{frame.y(point.y):.1f}"/>'
            )
    if start is not None and end is not None:
        x1, y1, x2, y2 = frame.x(start.x), frame.y(start.y), frame.x(end.x), frame.y(end.y)
        length = math.hypot(x2 - x1, y2 - y1)
        if length > 40:
            trace((x1, y1), (x2, y2))
            ux, uy = (x2 - x1) / length, (y2 - y1) / length
            tx, ty = x2 - 13 * ux, y2 - 13 * uy
            parts.append(
                f'<path class="arrow" d="M{x1 + 13 * ux:.1f} {y1 + 13 * uy:.1f}'
                f"L{tx:.1f} {ty:.1f}M{tx - 8 * ux - 5 * uy:.1f} {ty - 8 * uy + 5 * ux:.1f}"
                f'L{tx:.1f} {ty:.1f}L{tx - 8 * ux + 5 * uy:.1f} {ty - 8 * uy - 5 * ux:.1f}"/>'
            )
    # attacked versions are drawn first (below), labels of the large marks are placed first
    for point in sorted(points, key=lambda point: not point.small):
        parts.append(
            _mark(
                point.kind, frame.x(point.x), frame.y(point.y), 4.5 if point.small else 7.5,
                point.title, "attacked" if point.small else "",
            )
        )  # fmt: skip
    if ideal is not None:
        place = (max(frame.x(ideal[0]), frame.left + 3) + 7, frame.top + 11)
        avoid.extend((place[0] + shift, place[1] - 4) for shift in range(0, 50, 3))
        parts.append(f'<text class="zone" x="{place[0]:.1f}" y="{place[1]:.1f}">← the aim</text>')
    labelled = sorted(points, key=lambda point: point.small)
    anchors = [
        (frame.x(point.x), frame.y(point.y), 4.5 if point.small else 7.5, point.badge)
        for point in labelled
    ]
    for point, (cx, cy, text) in zip(labelled, _place(anchors, frame, avoid), strict=True):
        style = "number" if point.small else "name"
        parts.append(
            f'<text class="{style} {escape(point.kind)}" x="{cx:.1f}" y="{cy + 4:.1f}" '
            f'text-anchor="middle">{escape(text)}</text>'
        )
    return _svg(identifier, size, title, description, "".join(parts))


def _within(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Ends of error bars as far as an axis follows them: a third of the means' own range.

    With two or three runs an interval can be many times wider than everything else.
    """
    low, high = min(values), max(values)
    reach = (high - low or abs(high) or 1.0) / 3
    floor, ceiling = low - reach, high + reach
    if low >= 0 and high <= 1:
        floor, ceiling = max(floor, 0.0), min(ceiling, 1.0)
    return [min(max(end, floor), ceiling) for end in ends]


def _error_bar(
    interval: tuple[float, float],
    across: float,
    place: Callable[[float], float],
    edges: tuple[float, float],
    *,
    upright: bool,
) -> str:
    """A line over an interval; an end that lies outside of the frame has no cap."""
    parts = []
    ends = [min(max(place(value), edges[0]), edges[1]) for value in interval]
    for value, end in zip(interval, ends, strict=True):
        if abs(place(value) - end) < 0.01:
            parts.append((end, across - 3, end, across + 3))
    parts.append((ends[0], across, ends[1], across))
    return "".join(
        '<line class="error" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(
            *((y1, x1, y2, x2) if upright else (x1, y1, x2, y2))
        )
        for x1, y1, x2, y2 in parts
    )  # fmt: skip


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
        numbered: Methods carry their badges instead of their names.
        x_line: A vertical line at the reference's value, where a method is best.
        y_line: A horizontal line, such as the utility of a reference that has no x.
        y_text: What the horizontal line is.
        from_zero: The horizontal axis starts at 0.
    """
    xs = [*(spot.x for spot in spots), *([x_line] if x_line is not None else [])]
    ys = [*(spot.y for spot in spots), *([y_line] if y_line is not None else [])]
    x_ends = [end for spot in spots if spot.x_interval for end in spot.x_interval]
    y_ends = [end for spot in spots if spot.y_interval for end in spot.y_interval]
    frame = _Frame(
        size,
        (38, 22, 48, 52),
        domain([*xs, *_within(xs, x_ends)], from_zero=from_zero),
        domain([*ys, *_within(ys, y_ends)]),
    )
    parts = [frame.axes(x_label, y_label)]
    avoid: list[tuple[float, float]] = []
    # the numbers beside the vertical axis, and its title above
    taken = [
        (0.0, frame.top, frame.left - 2, frame.bottom),
        (frame.left, 0.0, frame.left + 7.0 * len(y_label), 20.0),
    ]
    if x_line is not None:
        x = frame.x(x_line)
        start = x < size[0] * 0.7
        edge = x + (6 if start else -6)
        parts.append(
            f'<line class="aim" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
            f'<text class="zone" x="{edge:.1f}" y="{frame.top + 4:.1f}" '
            f'text-anchor="{"start" if start else "end"}">best: as the reference</text>'
        )
        avoid.extend((x, frame.top + step * 8) for step in range(int(size[1] / 8)))
        reach = 140.0
        taken.append(
            (edge - reach * (not start), frame.top - 8, edge + reach * start, frame.top + 8)
        )
    if y_line is not None:
        y = frame.y(y_line)
        parts.append(
            f'<line class="aim" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="zone" x="{frame.right}" y="{y - 6:.1f}" text-anchor="end">'
            f"{escape(y_text)}</text>"
        )
        avoid.extend((frame.left + step * 8, y) for step in range(int(size[0] / 8)))
        taken.append((frame.right - 150, y - 18, frame.right, y - 2))
    for spot in spots:
        place = (frame.x(spot.x), frame.y(spot.y))
        if spot.x_interval is not None:
            parts.append(_error_bar(
                spot.x_interval, place[1], frame.x, (frame.left, frame.right), upright=False
            ))  # fmt: skip
        if spot.y_interval is not None:
            parts.append(_error_bar(
                spot.y_interval, place[0], frame.y, (frame.top, frame.bottom), upright=True
            ))  # fmt: skip
        for interval, upright in ((spot.x_interval, False), (spot.y_interval, True)):
            for step in range(13 if interval is not None else 0):
                assert interval is not None
                value = interval[0] + (interval[1] - interval[0]) * step / 12
                avoid.append((place[0], frame.y(value)) if upright else (frame.x(value), place[1]))
    # the two that everything is compared with are larger and lie below, so that they hide nobody
    order = sorted(spots, key=lambda spot: spot.kind not in ("original", "reference"))
    for spot in order:
        radius = 8.5 if spot.kind in ("original", "reference") else 5.5
        parts.append(_mark(spot.kind, frame.x(spot.x), frame.y(spot.y), radius, spot.title))
    anchors = [
        (frame.x(spot.x), frame.y(spot.y), 7.0, spot.badge if numbered else _cut(spot.name))
        for spot in order
    ]
    found = _place(
        anchors, frame, avoid, taken=taken, distances=(3.0, 12.0, 24.0, 38.0, 54.0, 72.0, 96.0),
        character=7.6, overlap=12.0,
    )  # fmt: skip
    for spot, anchor, (cx, cy, text) in zip(order, anchors, found, strict=True):
        half = 3.8 * len(text) + 2
        near = (min(max(anchor[0], cx - half), cx + half), min(max(anchor[1], cy - 7), cy + 7))
        if math.dist(near, anchor[:2]) > 24:  # so far away that a line must say whose name it is
            parts.append(
                f'<line class="leader" x1="{anchor[0]:.1f}" y1="{anchor[1]:.1f}" '
                f'x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>'
            )
        parts.append(
            f'<text class="name {escape(spot.kind)}" x="{cx:.1f}" y="{cy + 4:.1f}" '
            f'text-anchor="middle"><title>{escape(spot.title)}</title>{escape(text)}</text>'
        )
    return _svg(identifier, size, title, description, "".join(parts))


def spaced(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least ``gap`` apart and inside [low, high] where there is room; order is kept.

    Args:
        places: In ascending order.
    """
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap if found else low))
    ceiling = high
    for index in reversed(range(len(found))):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - gap
    return found


def _cut(text: str, most: int = 22) -> str:
    """A label that fits; the whole text is in its tooltip."""
    return text if len(text) <= most else text[: most - 1] + "…"


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
    longest = max(len(_cut(line.label)) for line in kept)
    margin = max(88.0, 8.2 * longest + 14) if named else 16.0
    size = (372.0 + max(margin, 88.0), 270.0 + 15.0 * max(0, len(kept) - 10) * named)
    xs = [float(x) for line in kept for x, y in zip(line.xs, line.ys, strict=True) if finite(y)]
    ys = [float(y) for line in kept for y in line.ys if y is not None and finite(y)]
    frame = _Frame(
        size,
        (32, margin, 46, 52),
        (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1),
        domain(ys, from_zero=from_zero),
    )
    parts = [frame.axes(x_label, y_label, counted=all(x == round(x) for x in xs))]
    ends: list[tuple[float, float, Line]] = []
    for line in kept:
        stroke, last = "", (0.0, 0.0)
        pen = "M"
        count = sum(finite(y) for y in line.ys)
        marks = []
        for x, y in zip(line.xs, line.ys, strict=True):
            if y is None or not finite(y):
                pen = "M"
                continue
            last = (frame.x(x), frame.y(y))
            stroke += f"{pen}{last[0]:.1f} {last[1]:.1f}"
            pen = "L"
            if count <= 24:
                marks.append(_mark(line.kind, *last, 3.2, f"{line.label}, {x:g}: {_short(y)}"))
        parts.append(f'<path class="line {escape(line.kind)}" d="{stroke}"/>{"".join(marks)}')
        ends.append((last[1], last[0], line))
    if named:
        ends.sort(key=lambda end: (end[0], end[2].label))
        heights = spaced([y + 4 for y, _, _ in ends], 15.0, frame.top + 4, frame.bottom + 4)
        for (y, x, line), height in zip(ends, heights, strict=True):
            if frame.right - x > 12 or abs(height - 4 - y) > 6:
                parts.append(
                    f'<line class="leader {escape(line.kind)}" x1="{x + 4:.1f}" y1="{y:.1f}" '
                    f'x2="{frame.right + 6:.1f}" y2="{height - 4:.1f}"/>'
                )
            parts.append(
                f'<text class="name {escape(line.kind)}" x="{frame.right + 9:.1f}" '
                f'y="{height:.1f}"><title>{escape(line.label)}</title>'
                f"{escape(_cut(line.label))}</text>"
            )
    return _svg(identifier, size, title, description, "".join(parts))


def stacked_bars(
    bars: Sequence[Bar],
    classes: Sequence[str],
    *,
    identifier: str,
    title: str,
    description: str,
) -> Markup:
    """One horizontal bar per system, full width = 100 %; shares of 8 % and more are written in."""
    left, width, row = 92.0, 360.0, 34.0
    size = (left + width + 8, row * len(bars) + 26)
    parts = []
    for index, bar in enumerate(bars):
        y, x = index * row + 2, left
        parts.append(
            f'<text class="tick strong" x="{left - 10}" y="{y + 18:.1f}" text-anchor="end">'
            f"{escape(bar.label)}</text>"
        )
        for name in classes:
            share = bar.shares.get(name, 0.0)
            share = min(max(share, 0.0), 1.0) if finite(share) else 0.0
            if share == 0:
                continue
            length = share * width
            parts.append(
                f'<rect class="share {escape(name)}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{length:.1f}" height="26"><title>'
                f"{escape(bar.label)}: {escape(name)} {share:.0%}</title></rect>"
            )
            if share >= 0.08:
                parts.append(
                    f'<text class="inside" x="{x + length / 2:.1f}" y="{y + 17:.1f}" '
                    f'text-anchor="middle">{share * 100:.0f}</text>'
                )
            x += length
    y = row * len(bars)
    for share in (0, 50, 100):
        anchor = {0: "start", 50: "middle", 100: "end"}[share]
        parts.append(
            f'<text class="tick" x="{left + width * share / 100:.1f}" y="{y + 16:.1f}" '
            f'text-anchor="{anchor}">{share} %</text>'
        )
    return _svg(identifier, size, title, description, "".join(parts))


def micro_range(values: Mapping[str, Number], low: float, high: float) -> Markup:
    """A cell's own axis: where original, unlearned and reference lie between low and high."""
    width, y = 136.0, 7.0
    parts = [f'<line class="track" x1="5" x2="{width - 5}" y1="{y}" y2="{y}"/>']
    for kind in ("original", "reference", "unlearned"):
        value = values.get(kind)
        if value is not None and finite(value):
            place = 5 + (value - low) / ((high - low) or 1.0) * (width - 10)
            parts.append(_mark(kind, min(max(place, 5), width - 5), y, 3.4))
    return Markup(
        f'<svg class="micro" viewBox="0 0 {width:g} 14" aria-hidden="true">{"".join(parts)}</svg>'
    )
