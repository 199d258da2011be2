"""The drawing library's room: a Vega-Lite specification becomes inline SVG that fits the page.

vl-convert runs Vega-Lite on this machine while the page is written, so a page needs neither a
script nor the network. Colours are CSS variables of ``style.css``, so charts follow light, dark
and print. What the library writes is then made fit for a page: the value of a mark becomes its
tooltip (``<title>``), the whole gets a name and a description, and what only a browser with
Vega would need goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from delible.report.charts.placing import Range

Row = Mapping[str, Any]
Spec = dict[str, Any]
#: Top, right, bottom, left of the plot area: room for the axes' labels.
Margins = tuple[float, float, float, float]
#: Zero is short, and small numbers keep their digits.
NUMBER = (
    "datum.value == 0 ? '0' : abs(datum.value) < 1e-3 ? format(datum.value, '.2~e') : datum.label"
)
AXIS = {
    "labelFontSize": 12, "labelColor": "var(--soft)", "labelExpr": NUMBER,
    "titleFontSize": 12, "titleFontWeight": "normal", "titleColor": "var(--soft)",
    "domainColor": "var(--strong-rule)", "tickColor": "var(--strong-rule)",
    "gridColor": "var(--rule)", "labelOverlap": True, "labelFlush": False,
}  # fmt: skip
THEME = {
    "view": {"stroke": None},
    "axis": AXIS,
    "axisX": {"grid": False, "tickSize": 4, "labelPadding": 5, "tickCount": 5,
              "titleY": 40, "titleBaseline": "alphabetic"},
    "axisY": {
        "domain": False, "ticks": False, "labelPadding": 8, "tickCount": 5,
        "titleAngle": 0, "titleAlign": "left", "titleBaseline": "alphabetic",
        "titleX": 0, "titleY": -19,
    },
    "text": {"fontSize": 12},
}  # fmt: skip
#: Attributes of the library's SVG that say nothing in a page: the whole chart is one image with a
#: name and a description, and the page's style has the font.
NEEDLESS = {
    "role", "aria-label", "aria-hidden", "aria-roledescription", "font-family", "pointer-events",
    "stroke-miterlimit",
}  # fmt: skip
NAMESPACE = "{http://www.w3.org/2000/svg}"
#: Characters that XML has no way to write.
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONG_NUMBER = re.compile(r"-?\d*\.\d{3,}(?:e-?\d+)?")


def number(name: str, limits: Range, title: str | None, **axis: Any) -> Spec:
    """An encoding of numbers with its axis."""
    return {
        "field": name,
        "type": "quantitative",
        "scale": {"domain": list(limits), "zero": False, "nice": False},
        "axis": {"title": title, **axis},
    }


def own(name: str) -> Spec:
    """An encoding whose rows carry the look itself (a colour, a shape, a size)."""
    return {"field": name, "type": "nominal", "scale": None, "legend": None}


def layer(name: str, mark: str | Spec, rows: Sequence[Row], **encoding: Spec) -> Spec:
    """Marks of one kind, one per row; ``name`` is their class in the page.

    Where rows have a ``title``, it is the tooltip of their marks.
    """
    look = {"type": mark} if isinstance(mark, str) else mark
    if any("title" in row for row in rows):
        encoding["description"] = {"field": "title", "type": "nominal"}
    else:  # or the library would tell the names of the fields
        look = {**look, "aria": False}
    return {"name": name, "mark": look, "data": {"values": list(rows)}, "encoding": encoding}


def chart(
    size: tuple[float, float], margins: Margins, x: Spec, y: Spec, layers: Sequence[Spec]
) -> Spec:
    """A specification: layers over one pair of axes. Layers without rows are left out.

    Args:
        size: Width and height of the plot area.
    """
    top, right, bottom, left = margins
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": size[0],
        "height": size[1],
        # a fixed frame: how wide this machine's letters are must not change the page
        "autosize": "none",
        "padding": {"top": top, "right": right, "bottom": bottom, "left": left},
        "background": None,
        "encoding": {"x": x, "y": y},
        "layer": [one for one in layers if one["data"]["values"]],
        "config": THEME,
    }


def draw(spec: Spec, *, identifier: str, title: str, description: str) -> Markup:
    """The chart as inline SVG; the same specification gives the same bytes.

    Args:
        identifier: Begins the ids of title and description; unique in its page.
        title: The chart's name, for those who do not see it.
        description: What it shows, in words.
    """
    import vl_convert  # a browser engine: only pages with charts wait for it

    text = json.dumps(_writable(spec), allow_nan=False)
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(text, allowed_base_urls=[]))
    _tidy(root)
    head = {"class": "chart", "role": "img", "viewBox": root.attrib["viewBox"]}
    head["aria-labelledby"] = f"{identifier}-title {identifier}-text"
    root.attrib = head
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{identifier}-{'text' if place else 'title'}"})
        element.text = text
        root.insert(place, element)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True))


def _writable(value: Any) -> Any:
    """Without characters that cannot be drawn; the library ends the process at some of them."""
    if isinstance(value, str):
        return UNWRITABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {key: _writable(one) for key, one in value.items()}
    return [_writable(one) for one in value] if isinstance(value, list | tuple) else value


def _tidy(element: ElementTree.Element) -> None:
    """Names, tooltips and short numbers; empty groups and backgrounds go."""
    element.tag = element.tag.removeprefix(NAMESPACE)
    said = element.get("aria-label") if element.get("role") == "graphics-symbol" else None
    kind = element.get("class", "")
    named = "role-mark" in kind
    for child in list(element):
        _tidy(child)
        hollow = child.tag in ("g", "text") and len(child) == 0 and not child.text
        if hollow or child.get("class") in ("background", "foreground"):
            element.remove(child)
    for name in NEEDLESS & set(element.attrib):
        del element.attrib[name]
    if "class" in element.attrib and kind not in ("background", "foreground"):
        element.attrib["class"] = kind.split()[-1].removesuffix("_marks")
    if element.get("opacity") == "1":
        del element.attrib["opacity"]
    for name, value in element.attrib.items():
        if name in ("d", "transform", "x2", "y2", "font-size"):
            element.attrib[name] = LONG_NUMBER.sub(_rounded, value)
    if said and element.tag != "g" and not named:
        title = ElementTree.Element("title")
        title.text = said
        title.tail, element.text = element.text, None
        element.insert(0, title)


def _rounded(found: re.Match[str]) -> str:
    """A hundredth of a pixel is enough."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
