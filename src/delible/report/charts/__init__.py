"""The charts of the pages: data become declarative Vega-Lite specifications, drawn as inline SVG.

``drawing.py`` is the drawing library's room, ``placing.py`` says where names stand, ``looks.py``
what a kind of system looks like. Systems differ in shape and dash as well as in colour; values
that are missing or not finite leave a gap.
"""

from delible.report.charts.bars import Bar, stacked_bars
from delible.report.charts.curves import Line, lines, thin
from delible.report.charts.scatter import Point, Spot, methods, scatter

__all__ = ["Bar", "Line", "Point", "Spot", "lines", "methods", "scatter", "stacked_bars", "thin"]
