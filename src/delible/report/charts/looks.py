"""What marks and lines look like by their kind, and what rows of charts have in common."""

from __future__ import annotations

from typing import Any

from delible.report.charts.drawing import Row, own
from delible.report.charts.placing import Place, Plane

#: What every mark and line looks like by its kind: colour, shape, dash.
LOOKS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "original": ("original", "square", (1.5, 4.5)),
    "unlearned": ("unlearned", "circle", ()),
    "reference": ("reference", "diamond", (6, 5)),
    "method": ("unlearned", "circle", ()),
    "editor": ("unlearned", "triangle-up", ()),
    "guard": ("unlearned", "circle", ()),
    "forget": ("forget", "circle", ()),
    "keep": ("keep", "circle", ()),
    "plain": ("reference", "circle", ()),
} | {
    f"series{index}": (f"s{index}", shape, ())
    for index, shape in enumerate(
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "circle", "square",
         "triangle-up")
    )
}  # fmt: skip
#: Kinds whose marks are rings: their shapes are taken by others already.
RINGS = {"guard", "series5", "series6", "series7"}
#: Further curves in the looks of earlier ones have these dashes.
DASHES = {"dash1": (7, 5), "dash2": (2, 4.5)}
#: Shapes whose size is from corner to corner look smaller than circles.
GROWN = {"diamond": 1.35, "triangle-up": 1.25, "triangle-down": 1.25}
#: Width of a letter of a name.
LETTER = 7.6
BOLD = {"type": "text", "fontWeight": 600, "fontSize": 12.5}
SOFT = {"type": "text", "fontSize": 12, "color": "var(--ideal-ink)"}
LEADER = {"type": "rule", "strokeWidth": 1, "opacity": 0.35}


def look(kind: str, radius: float = 3.2, *, ring: bool = False) -> dict[str, Any]:
    """Colour, shape, size and dash of a kind, as a row's fields.

    Args:
        radius: Of a circle; other shapes get a like weight.
        ring: As a ring, whatever the kind.
    """
    words = kind.split()
    name, shape, dash = LOOKS[words[0]]
    tone = f"var(--{name})"
    hollow = ring or words[0] in RINGS
    return {
        "tone": tone,
        "shape": shape,
        "size": (2 * radius * GROWN.get(shape, 1.0)) ** 2,
        "dash": list(next((DASHES[word] for word in words if word in DASHES), dash)),
        "fill": "var(--paper)" if hollow else tone,
        "edge": tone if hollow else "var(--paper)",
        "edge_width": 1.8 if hollow else 1.2,
    }


#: How marks take their looks from their rows.
MARKED = {
    "fill": own("fill"), "stroke": own("edge"), "strokeWidth": own("edge_width"),
    "shape": own("shape"), "size": own("size"),
}  # fmt: skip
POINT = {"type": "point", "filled": True, "opacity": 1}


def between(start: Place, end: Place) -> Row:
    """A line, as a row's fields."""
    return {"x": start[0], "y": start[1], "x2": end[0], "y2": end[1]}


RULED = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}


def text(plane: Plane, middle: Place, text: str) -> dict[str, Any]:
    """A text at a pixel, as a row's fields."""
    x, y = plane.numbers(*middle)
    return {"x": x, "y": y, "text": text}


def cut(text: str, most: int = 22) -> str:
    """A label that fits; the whole text is in its tooltip."""
    return text if len(text) <= most else text[: most - 1] + "…"
