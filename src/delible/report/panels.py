"""Charts of curves with their numbers, as pages show them (``charts.html.j2``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delible.bench.table import ORIGINAL, REFERENCE
from delible.measure.benchmark import Chart
from delible.report import charts
from delible.report.words import finite, number

#: Different looks of curves; further ones begin anew with another dash.
LOOKS = 8
#: Curves that are no methods, and how they are drawn.
BASELINES = {ORIGINAL: "original", REFERENCE: "reference", "reference": "reference"}


def panels(found: Sequence[Chart]) -> list[dict[str, Any]]:
    """What ``charts.html.j2`` shows of each chart that can be drawn."""
    drawn = [_panel(index, chart) for index, chart in enumerate(found)]
    return [panel for panel in drawn if panel is not None]


def _panel(index: int, chart: Chart) -> dict[str, Any] | None:
    """A chart and the numbers in it; ``None`` when nothing can be drawn."""
    series = []
    for place, curve in enumerate(chart.curves):
        other = f"series{place % LOOKS} dash{place // LOOKS % 3}"
        kind = BASELINES.get(curve.name, other)
        points = sorted((float(x), y) for x, y in curve.points if finite(x))
        series.append(charts.Line(curve.name, kind, [x for x, _ in points], [y for _, y in points]))
    svg = charts.lines(
        series,
        identifier=f"chart-{index}",
        title=chart.title,
        description="; ".join(
            f"{line.label} from {number(line.ys[0])} at {line.xs[0]:g} to "
            f"{number(line.ys[-1])} at {line.xs[-1]:g}"
            for line in series
            if line.ys
        ),
        x_label=chart.x_label,
        y_label=chart.y_label,
    )
    if svg is None:
        return None
    places = sorted({x for line in series for x in line.xs})
    by_curve = [dict(zip(line.xs, line.ys, strict=True)) for line in series]
    return {
        "title": chart.title,
        "svg": svg,
        "x_label": chart.x_label,
        "crowded": len(series) > LOOKS,
        "curves": [line.label for line in series],
        "rows": [(f"{x:g}", [number(values.get(x)) for values in by_curve]) for x in places],
    }
