"""The charts themselves: what one can read from them, the same bytes, names that stand apart."""

from __future__ import annotations

import re
from typing import Any

import pytest

from delible.report import charts
from delible.report.charts import drawing, placing

NAMED = {"identifier": "c", "title": "Its name", "description": "What it shows"}


def lines(*series: charts.Line, **options: Any) -> str:
    return str(charts.lines(series, x_label="steps", y_label="loss", **NAMED, **options))


def bars(**shares: dict[str, float]) -> str:
    rows = [charts.Bar(label, one) for label, one in shares.items()]
    return str(charts.stacked_bars(rows, ["correct", "refusal", "odd"], **NAMED))


def scatter(*points: charts.Point, **options: Any) -> str:
    return str(charts.scatter(points, x_label="forget", y_label="retain", **NAMED, **options))


def methods(*spots: charts.Spot, **options: Any) -> str:
    return str(charts.methods(spots, x_label="forget", y_label="retain", **NAMED, **options))


def layer(chart: str, name: str) -> str:
    return "".join(re.findall(rf'<g class="{name}">(.*?)</g>', chart))


def told(chart: str, name: str) -> list[str]:
    """The tooltips of a layer."""
    return re.findall(r"<title>([^<]*)</title>", layer(chart, name))


LINE = charts.Line("npo", "series0", [0.0, 1.0, 2.0, 3.0], [0.5, 0.25, None, 0.125])
SPOT = charts.Spot(0.2, 0.5, "method", "npo", "1", "npo: 0.2 and 0.5", (0.1, 0.3), (0.4, 0.6))
OTHER = charts.Spot(0.6, 0.7, "guard", "detector", "2", "detector: 0.6 and 0.7")
POINTS = (
    charts.Point(0.9, 0.8, "original", "original", "original: 0.9"),
    charts.Point(0.1, 0.7, "unlearned", "unlearned", "unlearned: 0.1"),
    charts.Point(0.4, 0.6, "unlearned", "1", "relearned: 0.4", small=True),
)
DRAWN = {
    "lines": lambda: lines(LINE),
    "bars": lambda: bars(original={"correct": 0.93, "refusal": 0.07}),
    "scatter": lambda: scatter(*POINTS, ideal=(0.2, 0.7)),
    "methods": lambda: methods(SPOT, OTHER, x_line=0.3, y_line=0.65),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_data_give_the_same_bytes_whatever_was_drawn_before(kind: str) -> None:
    first = DRAWN[kind]()
    DRAWN["methods"]()
    assert DRAWN[kind]() == first


@pytest.mark.parametrize("kind", DRAWN)
def test_a_chart_is_one_image_with_a_name_and_a_description(kind: str) -> None:
    chart = DRAWN[kind]()
    assert chart.startswith('<svg class="chart" role="img" viewBox="0 0 ')
    assert 'aria-labelledby="c-title c-text"><title id="c-title">Its name</title>' in chart
    assert '<desc id="c-text">What it shows</desc>' in chart
    assert chart.count("role=") == 1
    assert re.findall(r' id="([^"]*)"', chart) == ["c-title", "c-text"]
    assert "://" not in chart
    # colours come from the page's style, so that they follow its theme
    colours = re.findall(r'(?:fill|stroke)="([^"]*)"', chart)
    assert {one for one in colours if one != "none" and not one.startswith("var(--")} == set()
    assert colours


def test_marks_lines_and_bars_say_their_values() -> None:
    chart = lines(LINE)
    assert told(chart, "points") == ["npo, 0: 0.500", "npo, 1: 0.250", "npo, 3: 0.125"]
    assert told(chart, "names") == ["npo"]
    long = charts.Line("loss", "forget", list(range(60)), [1 / (1 + x) for x in range(60)])
    chart = lines(long, named=False)
    assert layer(chart, "points") == ""
    assert told(chart, "lines") == ["loss"]
    chart = bars(original={"correct": 0.93, "refusal": 0.07}, unlearned={"refusal": 1.7})
    assert told(chart, "shares") == [
        "original: correct 93%", "original: refusal 7%", "unlearned: refusal 100%",
    ]  # fmt: skip
    assert told(scatter(*POINTS), "points") == ["relearned: 0.4", "original: 0.9", "unlearned: 0.1"]
    assert told(methods(SPOT, OTHER), "points") == [SPOT.title, OTHER.title]


def test_bars_stack_to_their_shares_and_write_in_those_with_room() -> None:
    chart = bars(original={"refusal": 0.25, "correct": 0.7, "odd": 0.05})
    places = re.findall(r'd="M([\d.]+),0h([\d.]+)v', layer(chart, "shares"))
    assert [(float(x), float(width)) for x, width in places] == [
        pytest.approx((0, 252)), pytest.approx((252, 90)), pytest.approx((342, 18)),
    ]  # fmt: skip
    inside = re.findall(
        r"translate\(([\d.]+),[^>]*><title>[^<]*</title>(\d+)<", layer(chart, "inside")
    )
    assert [(float(x), share) for x, share in inside] == [(126, "70"), (297, "25")]
    fills = re.findall(r'fill="([^"]*)"', layer(chart, "shares"))
    assert fills == ["var(--correct)", "var(--refusal)", "var(--other-class)"]
    assert all(f">{share} %<" in chart for share in (0, 50, 100))


def test_gaps_stay_gaps() -> None:
    (path,) = re.findall(r'd="([^"]*)"', layer(lines(LINE), "lines"))
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_axes_have_short_zeros_and_keep_the_digits_of_small_numbers() -> None:
    rate = charts.Line("rate", "plain", [0.0, 1.0], [0.0, 2e-5])
    chart = lines(rate, from_zero=True)
    assert ">2e-5<" in chart
    assert ">0<" in chart
    assert ">0.0" not in chart
    assert ">3,000<" in lines(charts.Line("speed", "plain", [0.0, 1.0], [2000.0, 3100.0]))


def test_an_arrow_leads_from_the_original_and_not_where_there_is_no_way() -> None:
    (tip,) = re.findall(r"rotate\((-?[\d.]+)\)", layer(scatter(*POINTS), "tip"))
    assert float(tip) < -90  # to the left, and down
    near = (POINTS[0], charts.Point(0.89, 0.8, "unlearned", "unlearned", "unlearned"))
    assert layer(scatter(*near, POINTS[2]), "tip") == ""


def test_text_may_hold_anything() -> None:
    odd = "a\x00b\x08<script>&\"'\ufffe\ud800{signal} datum.x"
    chart = lines(charts.Line(odd, "series0", [0.0, 1.0], [0.0, 1.0]))
    assert "a\ufffdb\ufffd&lt;script&gt;&amp;" in chart
    assert "{signal}" in chart
    assert "<script" not in chart


def test_nothing_is_fetched_while_drawing() -> None:
    x, y = (drawing.number(name, (0, 1), name) for name in "xy")
    points = drawing.layer("points", "point", [{"x": 0, "y": 0}])
    spec = drawing.chart((100, 100), (0, 0, 0, 0), x, y, [points])
    assert "<svg" in drawing.draw(spec, **NAMED)
    spec["layer"][0]["data"] = {"url": "https://example.invalid/rows.json"}
    with pytest.raises(ValueError, match="not allowed"):
        drawing.draw(spec, **NAMED)


# --- where things stand --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "from_zero", "expected"),
    [
        ([0.2, 0.7], False, (0.16, 0.74)),
        ([0.2, 0.7], True, (0.0, 0.756)),
        ([0.0, 1.0], False, (0.0, 1.0)),
        ([10.0, 20.0], False, (9.2, 20.8)),
        ([5.0], False, (4.5, 5.5)),
    ],
)
def test_ranges_leave_a_margin_and_stay_inside_of_shares(
    values: list[float], from_zero: bool, expected: tuple[float, float]
) -> None:
    assert placing.domain(values, from_zero=from_zero) == pytest.approx(expected)


def test_a_place_is_a_pixel_and_back() -> None:
    plane = placing.Plane(200, 100, (-1, 3), (10, 20))
    assert plane.pixel(-1, 10) == pytest.approx((0, 100))
    assert plane.pixel(3, 20) == pytest.approx((200, 0))
    assert plane.numbers(*plane.pixel(0.7, 12.5)) == pytest.approx((0.7, 12.5))


def test_names_avoid_marks_each_other_and_the_edge() -> None:
    anchors = [placing.Anchor(190, 50, 5, "right"), placing.Anchor(170, 50, 5, "middle")]
    room = (0.0, 0.0, 200.0, 100.0)
    found = placing.beside(anchors, room, [], letter=6)
    boxes = [
        (x - 3 * len(one.text) - 2, y - 7.5, x + 3 * len(one.text) + 2, y + 7.5)
        for one, (x, y) in zip(anchors, found, strict=True)
    ]
    assert all(box[0] >= 0 and box[2] <= 200 and box[1] >= 0 and box[3] <= 100 for box in boxes)
    one, other = boxes
    assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    alone = placing.Anchor(50, 50, 5, "free")
    assert placing.beside([alone], room, [], letter=6) == [pytest.approx((73, 50))]
    assert placing.leader(alone, (73, 50), letter=6, least=24) is None
    assert placing.leader(alone, (120, 50), letter=6, least=24) == pytest.approx((106, 50))
