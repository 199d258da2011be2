"""Shares of classes as one bar per system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from delible.report.charts.drawing import chart, draw, layer, number, own
from delible.report.words import finite

#: The page's colours of outcome classes.
CLASS_COLOURS = {
    "correct": "correct", "refusal": "refusal", "wrong-but-fluent": "wrong", "garbage": "garbage",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One stacked bar: shares in [0, 1] by class."""

    label: str
    shares: Mapping[str, float]


def stacked_bars(
    bars: Sequence[Bar],
    classes: Sequence[str],
    *,
    identifier: str,
    title: str,
    description: str,
) -> Markup:
    """One horizontal bar per system, full width = 100 %; shares of 8 % and more are written in."""
    rows = []
    for bar in bars:
        for place, name in enumerate(classes):
            share = bar.shares.get(name, 0.0)
            share = min(max(share, 0.0), 1.0) if finite(share) else 0.0
            if share:
                rows.append({
                    "system": bar.label, "class": name, "share": share, "place": place,
                    "title": f"{bar.label}: {name} {share:.0%}",
                    "fill": f"var(--{CLASS_COLOURS.get(name, 'other-class')})",
                    "text": f"{share * 100:.0f}" if share >= 0.08 else "",
                })  # fmt: skip
    stacked = number(
        "share", (0.0, 1.0), None, values=[0, 0.5, 1], format="%", domain=False, ticks=False,
        labelExpr="datum.value * 100 + ' %'", labelFlush=True,
    )  # fmt: skip
    systems = {
        "field": "system", "type": "nominal", "sort": None,
        "scale": {"domain": [bar.label for bar in bars], "paddingInner": 0.24, "paddingOuter": 0},
        "axis": {"title": None, "labelColor": "var(--ink)", "labelFontSize": 12.5},
    }  # fmt: skip
    middle = {**stacked, "stack": "zero", "bandPosition": 0.5}
    order = {"field": "place", "type": "quantitative"}
    spec = chart(
        (360, 34 * len(bars) - 8),
        (2, 8, 24, 92),
        {**stacked, "stack": "zero"},
        systems,
        [
            layer("shares", {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 1.5}, rows,
                  fill=own("fill"), order=order),
            layer("inside", {"type": "text", "fontSize": 12, "color": "var(--inside)"},
                  rows, x=middle, text=own("text"), order=order,
                  detail=own("class")),
        ],
    )  # fmt: skip
    return draw(spec, identifier=identifier, title=title, description=description)
