"""Where things stand in a chart: ranges of axes, names beside marks, names at the ends of lines.

The library that draws has no page to measure letters on, so it cannot keep names apart; these
functions do, in the pixels of the plot area. Pure functions from numbers to numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[float, float]
Place = tuple[float, float]
#: Left, top, right, bottom.
Box = tuple[float, float, float, float]
#: Where a name may stand, seen from its mark.
SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
#: Height of a line of text.
TEXT_HEIGHT = 15.0


@dataclass(frozen=True)
class Plane:
    """The plot area: which numbers its edges stand for.

    Attributes:
        width, height: In pixels, without the axes' labels.
        x_range, y_range: Numbers at the left and right, at the bottom and top.
    """

    width: float
    height: float
    x_range: Range
    y_range: Range

    def pixel(self, x: float, y: float) -> Place:
        """The pixel of two numbers; y grows downwards."""
        (left, right), (bottom, top) = self.x_range, self.y_range
        return (
            (x - left) / ((right - left) or 1.0) * self.width,
            (top - y) / ((top - bottom) or 1.0) * self.height,
        )

    def numbers(self, x: float, y: float) -> Place:
        """The two numbers that stand at a pixel."""
        (left, right), (bottom, top) = self.x_range, self.y_range
        return (
            left + x / self.width * ((right - left) or 1.0),
            top - y / self.height * ((top - bottom) or 1.0),
        )


@dataclass(frozen=True)
class Anchor:
    """A mark that gets a name.

    Attributes:
        x, y, radius: Of the mark, in pixels.
    """

    x: float
    y: float
    radius: float
    text: str


def domain(values: Sequence[float], *, from_zero: bool = False) -> Range:
    """An axis range around the values; stays inside [0, 1] when they all do."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    margin = (high - low) * 0.08 or max(abs(high) * 0.1, 0.05)
    inside = min(values) >= 0 and max(values) <= 1
    bottom, top = (low if from_zero and low == 0 else low - margin), high + margin
    return (max(0.0, bottom), min(1.0, top)) if inside else (bottom, top)


def within(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Ends of error bars as far as an axis follows them: a third of the means' own range.

    With two or three runs an interval can be many times wider than everything else.
    """
    low, high = min(values), max(values)
    reach = (high - low or abs(high) or 1.0) / 3
    floor, ceiling = low - reach, high + reach
    if low >= 0 and high <= 1:
        floor, ceiling = max(floor, 0.0), min(ceiling, 1.0)
    return [min(max(end, floor), ceiling) for end in ends]


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


def along(start: Place, end: Place, count: int = 60) -> list[Place]:
    """Points on a line, that names keep off it."""
    return [
        (
            start[0] + (end[0] - start[0]) * step / count,
            start[1] + (end[1] - start[1]) * step / count,
        )
        for step in range(count + 1)
    ]


def beside(
    anchors: Sequence[Anchor],
    room: Box,
    avoid: Sequence[Place],
    *,
    taken: Sequence[Box] = (),
    distances: Sequence[float] = (4.0, 16.0, 30.0),
    letter: float = 8.4,
    overlap: float = 3.0,
) -> list[Place]:
    """A free place beside every mark for its name: the best of several offsets, in this order.

    Args:
        room: The box that names should stay inside.
        avoid: Points on lines and texts that a name should not cover.
        taken: Boxes where other texts stand.
        distances: From the mark, to be tried.
        letter: Width of a letter.
        overlap: How bad it is to cover a mark or another name.

    Returns:
        The middle of each name.
    """
    boxes = [*((a.x - a.radius, a.y - a.radius, a.x + a.radius, a.y + a.radius) for a in anchors)]
    boxes.extend(taken)
    placed: list[Place] = []
    for anchor in anchors:
        width = letter * len(anchor.text) + 4
        best: tuple[float, Place] | None = None
        for distance in distances:
            for right, down in SIDES:
                middle = (
                    anchor.x + right * (anchor.radius + distance + width / 2),
                    anchor.y + down * (anchor.radius + distance * 0.6 + TEXT_HEIGHT / 2),
                )
                box = _around(middle, width)
                badness = (
                    overlap * sum(_meet(box, other) for other in boxes)
                    + 10.0 * (not _inside(box, room))
                    + 0.25 * sum(_covers(box, place) for place in avoid)
                    + distance / 40
                )
                if best is None or badness < best[0]:
                    best = (badness, middle)
        assert best is not None
        boxes.append(_around(best[1], width))
        placed.append(best[1])
    return placed


def leader(anchor: Anchor, middle: Place, *, letter: float, least: float) -> Place | None:
    """Where a line from a mark meets its name; ``None`` where the name is near enough."""
    half = letter / 2 * len(anchor.text) + 2
    near = (
        min(max(anchor.x, middle[0] - half), middle[0] + half),
        min(max(anchor.y, middle[1] - 7), middle[1] + 7),
    )
    return near if math.dist(near, (anchor.x, anchor.y)) > least else None


def _around(middle: Place, width: float) -> Box:
    x, y = middle
    return (x - width / 2, y - TEXT_HEIGHT / 2, x + width / 2, y + TEXT_HEIGHT / 2)


def _meet(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
    )  # fmt: skip


def _inside(box: Box, room: Box) -> bool:
    return (
        box[0] >= room[0] and box[2] <= room[2] and box[1] >= room[1] and box[3] <= room[3]
    )  # fmt: skip


def _covers(box: Box, place: Place) -> bool:
    return box[0] - 2 < place[0] < box[2] + 2 and box[1] - 1 < place[1] < box[3] + 1
