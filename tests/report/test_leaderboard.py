"""The pages of benchmarks and experiments as text, and what is best in them."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from delible.bench.table import Number, Table, TableRow, tabulate
from delible.cli import tables
from delible.errors import RunError
from delible.measure.benchmark import Chart, Curve, Findings
from delible.report import charts, ranking
from delible.report.charts import placing
from delible.report.findings import render_findings, write_findings
from delible.report.leaderboard import render_page, write_page
from delible.report.words import number, text_of

EXAMPLE = runpy.run_path(str(Path(__file__).with_name("leaderboard_example.py")))
CHECKS = runpy.run_path(str(Path(__file__).with_name("test_report.py")))
ORIGINAL, REFERENCE = EXAMPLE["ORIGINAL"], EXAMPLE["REFERENCE"]
DESCRIBED = {"experiment": {"name": "shares"}, "model": "default", "methods": ["npo"]}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def page(kind: str = "Example", cells: Any = None, **changed: Any) -> str:
    benchmark = EXAMPLE[kind]()
    cells = EXAMPLE["cells"]() if cells is None else cells
    return render_page(benchmark, tabulate(benchmark, cells), cells, EXAMPLE["common"](**changed))


@pytest.fixture(scope="module")
def text() -> str:
    return page()


def words(text: str) -> str:
    return str(CHECKS["visible"](text))


def row(text: str, method: str) -> list[str]:
    """The cells of a method in the table, without the tags."""
    table = text.split('id="leaderboard"')[1].split("</table>")[0]
    found = next(part for part in table.split("<tr")[1:] if f"<span>{method}</span>" in part)
    return [words("<td" + part).strip() for part in re.split(r"<t[dh]\b", found)[1:]]


def table_of(better: str, **means: Any) -> Table:
    """One column, one row per method; a mean, or (mean, low, high)."""
    column = EXAMPLE["Column"]("title", "key", better)
    numbers = {
        name: Number(*value, runs=3) if isinstance(value, tuple) else Number(value, runs=1)
        for name, value in means.items()
    }
    rows = (TableRow(name.replace("_", " "), {"key": one}) for name, one in numbers.items())
    return Table((column,), tuple(rows))


# --- what is best --------------------------------------------------------------------------


@pytest.mark.parametrize(("better", "best"), [("lower", "a"), ("higher", "c"), ("reference", "b")])
def test_best_follows_the_direction_and_leaves_the_baselines_out(better: str, best: str) -> None:
    table = table_of(better, retrained_reference=0.25, original=0.99, a=0.1, b=0.3, c=0.5)
    assert ranking.places(table) == {(best, "key"): "best"}


def test_best_at_the_reference_needs_a_reference() -> None:
    assert ranking.places(table_of("reference", original=0.9, a=0.1, b=0.3)) == {}
    none = table_of("reference", retrained_reference=None, a=0.1, b=0.3)
    assert ranking.places(none) == {}


def test_a_single_method_is_not_the_best() -> None:
    assert ranking.places(table_of("lower", original=0.9, a=0.1, b=None)) == {}


def test_equal_means_are_all_best_and_values_that_are_not_finite_are_not() -> None:
    table = table_of("lower", a=0.1, b=0.1, c=float("-inf"), d=float("nan"))
    assert ranking.places(table) == {("a", "key"): "best", ("b", "key"): "best"}


def test_overlapping_intervals_are_level_with_the_best() -> None:
    table = table_of(
        "lower", a=(0.1, 0.0, 0.2), near=(0.3, 0.19, 0.41), far=(0.4, 0.21, 0.59), single=0.15
    )
    assert ranking.places(table) == {("a", "key"): "best", ("near", "key"): "level"}


def test_at_the_reference_an_interval_that_holds_it_reaches_zero_distance() -> None:
    table = table_of(
        "reference",
        retrained_reference=0.5,
        below=(0.45, 0.40, 0.50),
        around=(0.6, 0.3, 0.9),
        above=(0.7, 0.62, 0.78),
    )
    loss = ranking.loss(Number(0.6, 0.3, 0.9, 3), table.columns[0], 0.5)
    assert loss is not None
    assert (loss.mean, loss.least, loss.most) == pytest.approx((0.1, 0.0, 0.4))
    assert ranking.places(table) == {("below", "key"): "best", ("around", "key"): "level"}


def test_the_front_holds_whom_nobody_beats_in_both() -> None:
    def two(x: float | None, y: float) -> dict[str, Number]:
        return {"x": Number(x, runs=1), "y": Number(y, runs=1)}

    column = EXAMPLE["Column"]
    columns = (column("x", "x", "reference", "forget"), column("y", "y", "higher", "utility"))
    rows = {
        REFERENCE: two(0.5, 1.0),
        "near": two(0.45, 0.6),
        "far but useful": two(0.9, 0.8),
        "beaten": two(0.6, 0.5),
        "same as near": two(0.45, 0.6),
        "no value": two(None, 0.9),
    }
    table = Table(columns, tuple(TableRow(name, numbers) for name, numbers in rows.items()))
    assert ranking.front(table) == ["near", "far but useful", "same as near"]


# --- the leaderboard -----------------------------------------------------------------------


def test_tasks_in_order_become_curves(text: str) -> None:
    assert "From task to task" not in text
    cells = EXAMPLE["cells_in_order"]()
    ordered = page("InOrder", cells)
    said = words(ordered[ordered.index('id="along"') : ordered.index('id="table"')])
    assert "over requests, one after the other; means over seeds" in said
    mean = (
        sum(
            cell["numbers"]["model_utility"]
            for cell in cells
            if (cell["method"], cell["task"]) == ("rmu", "request020")
        )
        / 2
    )
    rows = said[said.rindex("The numbers of this chart") :]
    assert " 10 " in rows
    assert " 40 " in rows
    assert number(mean) in rows
    assert "From task to task" not in page("InOrder", EXAMPLE["cells"](["npo"], 1))


@pytest.mark.parametrize("kind", ["Example", "HigherForgets", "LowerForgets", "InOrder"])
def test_pages_are_well_formed_self_contained_and_deterministic(kind: str) -> None:
    text = page(kind)
    checker = CHECKS["check"](text)
    assert all(address.startswith("#") for address in checker.addresses)
    for address in checker.addresses:
        assert f'id="{address[1:]}"' in text
    assert not {"link", "img", "iframe", "object", "base"} & set(checker.tags)
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in text
    assert "None" not in words(text)
    assert text == page(kind)


def test_the_page_says_what_is_asked_and_where_it_misleads(text: str) -> None:
    said = words(text)
    assert "all that is known about them is what was taught" in said
    assert "a method that breaks that wording looks good" in said
    assert "arXiv 2401.06121" in said
    assert "3 metrics, and where each misleads" in said


def test_the_table_shows_mean_interval_and_a_sign_for_the_best(text: str) -> None:
    cells = EXAMPLE["cells"]()
    table = tabulate(EXAMPLE["Example"](), cells)
    numbers = {one.method: one.numbers for one in table.rows}
    npo = numbers["npo"]["answer_probability/forget"]
    assert npo.mean is not None
    assert npo.low is not None
    half = npo.mean - npo.low
    assert row(text, "npo")[1].endswith(f"{npo.mean:.3f} ± {half:.3f}")
    aim = numbers[REFERENCE]["answer_probability/forget"].mean
    nearest = min(
        EXAMPLE["METHODS"],
        key=lambda name: abs(numbers[name]["answer_probability/forget"].mean - aim),
    )
    assert "◆best: " in row(text, nearest)[1].replace("◆ ", "◆")
    others = [name for name in EXAMPLE["METHODS"] if name != nearest]
    assert not any("◆" in row(text, name)[1] for name in others)
    assert not any("◆" in cell for name in (ORIGINAL, REFERENCE) for cell in row(text, name))
    assert "Nothing is marked as best in PrivLeak" in words(text)


def test_percent_columns_and_runs_without_a_value(text: str) -> None:
    assert "forget ROUGE-L, %" in text
    assert row(text, "dpo")[3].endswith("2 of 3 runs")
    assert "1 of 3 runs" in row(text, "purge")[1]
    assert row(text, "target_detector")[9] == "– (no run has a value)"


def test_failures_counts_skipped_and_stops_are_told(text: str) -> None:
    said = words(text)
    assert "2 of 3 runs failed" in row(text, "purge")[0]
    failed = words(text.split('id="failures"')[1].split("</section>")[0])
    assert EXAMPLE["REASON"] in failed
    assert "forget10: seeds 0, 2" in failed
    without = words(text.split('id="without-value"')[1].split("</section>")[0])
    assert "never averaged as 0" in without
    assert "gradient_ascent truth_ratio/forget 9 120" in without
    assert "not a finite number (inf) (6)" in without
    skipped = words(text.split('id="skipped"')[1].split("</section>")[0])
    assert f"gradient_norm {EXAMPLE['SKIPPED']} target_detector" in skipped.replace("&#39;", "'")
    assert "the loss is not finite at step 118" in said


def test_a_method_that_always_failed_keeps_its_row_with_the_reason() -> None:
    cells = [cell for cell in EXAMPLE["cells"]() if (cell["method"], cell["seed"]) != ("purge", 1)]
    text = page(cells=cells)
    assert row(text, "purge")[1].startswith("– (failed: purge: the recipe needs names")
    assert "Not in the picture, because a value is missing: purge." in words(text)


def test_how_to_reproduce(text: str) -> None:
    methods = ",".join(EXAMPLE["METHODS"])
    command = text.split('aria-label="Command"><code>')[1].split("</code>")[0]
    assert command == (
        f"delible bench example --methods {methods} --model default --seeds 3 "
        "--attacks &#39;{&#34;name&#34;: &#34;relearn&#34;, &#34;steps&#34;: 50}&#39;"
    )
    said = words(text)
    assert "x86_64, 2 processors, 2 threads, 16 GiB memory" in said
    assert "torch 2.13.0" in said
    benchmark = EXAMPLE["Example"](authors=20)
    cells = EXAMPLE["cells"](["npo"], 1)
    changed = EXAMPLE["common"](tune=8, data="/data/tofu files", attacks=[])
    other = render_page(benchmark, tabulate(benchmark, cells), cells, changed)
    assert (
        "delible bench example --methods npo --model default --authors 20 --seeds 1 "
        "--data &#39;/data/tofu files&#39; --tune 8<" in other
    )


def test_a_budget_is_shown_where_there_is_one(text: str) -> None:
    assert "Training budget" not in words(text)
    assert "Training budget that all recipes share Epochs 5 Batch size 32" in words(
        page("SameBudget", EXAMPLE["cells"](["npo"], 1))
    )


def test_a_step_that_is_not_measured_is_no_run() -> None:
    cells = EXAMPLE["cells"](["npo"], 1)
    step = {**EXAMPLE["cell"]("npo", 0, "step1"), "numbers": {}, "values": {"items": {}}}
    assert "of 2 runs" not in words(page(cells=[*cells, step]))


def test_a_page_of_no_and_of_few_runs_renders() -> None:
    assert "No run has finished yet." in page(cells=[])
    text = page(cells=EXAMPLE["cells"]([]))
    assert 'id="trade-off"' in text
    assert "Not beaten" not in words(text)


def test_hostile_text_is_escaped() -> None:
    cells = EXAMPLE["cells"](["npo"], 2)
    cells[2] |= {"method": HOSTILE, "task": HOSTILE, "skipped": {HOSTILE: HOSTILE}}
    cells[2] |= {"counts": {HOSTILE: 2}, "notes": {"stopped": HOSTILE, "tuned": {"a": HOSTILE}}}
    cells[2] |= {"options": {HOSTILE: HOSTILE}}
    cells[3] |= {"failed": HOSTILE}
    text = page(cells=cells, model=HOSTILE, versions={HOSTILE: HOSTILE}, hardware=HOSTILE)
    checker = CHECKS["check"](text)
    assert checker.tags.count("script") == 1
    assert "img" not in checker.tags


# --- the chart -----------------------------------------------------------------------------


def chart_of(text: str, name: str) -> str:
    return text.split(f'aria-labelledby="trade-{name}-title')[1].split("</svg>")[0]


def layer_of(chart: str, name: str) -> str:
    """The marks of one layer; empty where it has none."""
    return "".join(re.findall(rf'<g class="{name}">(.*?)</g>', chart))


def ruled(layer: str) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of lines."""
    found = re.findall(r'translate\(([\d.-]+),([\d.-]+)\)" x2="([\d.-]+)" y2="([\d.-]+)"', layer)
    return [tuple(map(float, one)) for one in found]


def test_the_chart_draws_the_aim_where_the_reference_is(text: str) -> None:
    chart = chart_of(text, "wide")
    (aim,) = ruled(layer_of(chart, "aims"))
    points = layer_of(chart, "points")
    diamond = re.search(r'translate\(([\d.]+),[\d.]+\)"[^>]*fill="var\(--reference\)"', points)
    assert diamond is not None
    assert aim[0] == pytest.approx(float(diamond[1]), abs=0.02)
    assert aim[2] == pytest.approx(0)
    assert abs(aim[3]) > 300
    assert "nearest to the reference is best" in chart
    assert layer_of(chart, "names").count("</text>") == 14
    # a square, a diamond, a triangle; circles and a ring
    shapes = Counter(re.findall(r' d="([^"]*)"', points)).most_common()
    assert [count for _, count in shapes] == [11, 1, 1, 1]
    assert points.count('fill="var(--paper)"') == 1


def test_every_mark_says_its_values_when_one_points_at_it(text: str) -> None:
    points = layer_of(chart_of(text, "wide"), "points")
    said = re.findall(r"<title>([^<]*)</title></path>", points)
    assert len(said) == points.count("<path") == 14
    npo = next(one for one in said if one.startswith("npo: "))
    mean = row(text, "npo")[1].replace("◇", "").replace("level with the best: ", "").strip()
    assert npo.startswith(f"npo: forget probability {mean}, model utility 0.")


def test_error_bars_are_there_for_several_seeds_only(text: str) -> None:
    chart = chart_of(text, "wide")
    bars = ruled(layer_of(chart, "errors"))
    assert len(bars) == 2 * 11  # one method has a single run; the baselines, too
    assert sorted({(width == 0, height == 0) for _, _, width, height in bars}) == [
        (False, True),
        (True, False),
    ]
    assert layer_of(chart, "vertical_caps").count("<path") > 11
    once = chart_of(page(cells=EXAMPLE["cells"](seeds=1)), "wide")
    assert layer_of(once, "points")
    assert layer_of(once, "errors") == ""


def test_the_narrow_chart_has_numbers_that_the_list_explains(text: str) -> None:
    badges = re.findall(r"</title>(\d+)</text>", chart_of(text, "narrow"))
    assert sorted(map(int, badges)) == list(range(1, 13))
    keys = text.split('aria-label="Numbers in the chart"')[1].split("</ol>")[0]
    assert re.findall(r"<li><span>(\w+)</span>", keys) == list(EXAMPLE["METHODS"])
    # the number beside a mark is that of its method
    third = re.search(r"<title>([^<]*)</title>3</text>", chart_of(text, "narrow"))
    assert third is not None
    assert third[1].startswith("npo: forget probability 0.")


def test_a_higher_axis_points_right_and_a_reference_without_x_is_a_level_line() -> None:
    text = page("HigherForgets")
    chart = chart_of(text, "wide")
    assert "higher is better →" in chart
    assert "the reference’s utility" in chart
    (line,) = ruled(layer_of(chart, "aims"))
    assert line[3] == pytest.approx(0)
    assert abs(line[2]) > 300
    assert "model utility, %" in chart
    assert "a value is missing: retrained reference" in words(text)


def test_without_a_reference_nothing_is_drawn_or_marked_by_it() -> None:
    cells = [cell for cell in EXAMPLE["cells"]() if cell["method"] != REFERENCE]
    text = page("LowerForgets", cells)
    assert "← lower is better" in chart_of(text, "wide")
    assert layer_of(chart_of(text, "wide"), "aims") == ""
    assert "No retrained reference." in words(text)
    text = page("Example", cells)
    assert "best: unknown, no reference" in chart_of(text, "wide")


@pytest.mark.parametrize("side", ["x_interval", "y_interval"])
def test_a_huge_interval_does_not_squeeze_the_chart(side: str) -> None:
    def apart(interval: tuple[float, float] | None) -> float:
        spots = [
            charts.Spot(0.2, 0.5, "method", "a", "1", "a", **{side: interval}),
            charts.Spot(0.4, 0.6, "method", "b", "2", "b"),
        ]
        svg = charts.methods(
            spots, identifier="c", title="t", description="d", x_label="x", y_label="y"
        )
        found = re.findall(r"translate\(([\d.]+),([\d.]+)\)", layer_of(svg, "points"))
        (x, y), (other_x, other_y) = (tuple(map(float, one)) for one in found)
        return other_x - x if side == "x_interval" else y - other_y

    plain, wide = apart(None), apart((-50.0, 50.0))
    assert plain > 0
    assert wide > 0.4 * plain


def test_labels_of_a_crowded_chart_do_not_cover_each_other(text: str) -> None:
    boxes = [
        (float(x) - 3.4 * len(name), float(y) - 10, float(x) + 3.4 * len(name), float(y) + 2)
        for x, y, name in re.findall(
            r"translate\(([\d.]+),([\d.]+)\)[^>]*><title>[^<]*</title>([^<]*)<",
            layer_of(chart_of(text, "wide"), "names"),
        )
    ]
    assert len(boxes) == 14
    for index, one in enumerate(boxes):
        for other in boxes[:index]:
            apart = (
                one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            )
            assert apart, (one, other)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1.0, 2.0], [1.0, 11.0]),
        ([95.0, 96.0, 97.0], [80.0, 90.0, 100.0]),
        ([0.0, 50.0, 100.0], [0.0, 50.0, 100.0]),
        ([], []),
    ],
)
def test_names_are_spaced_and_stay_inside(given: list[float], expected: list[float]) -> None:
    assert placing.spaced(given, 10.0, 0.0, 100.0) == pytest.approx(expected)


# --- experiments ---------------------------------------------------------------------------


def test_findings_have_notes_charts_and_a_table() -> None:
    text = render_findings(EXAMPLE["Question"](), EXAMPLE["findings"](), DESCRIBED)
    checker = CHECKS["check"](text)
    assert checker.tags.count("svg") == 2
    said = words(text)
    assert "Does a small part of the forget set do what all of it does?" in said
    assert "random_coreset leaves a forget probability of 0.689" in said
    assert "delible bench shares --methods npo --model default" in said
    assert "not recorded here" in said
    table = text.split('id="findings-table"')[1].split("</table>")[0]
    assert table.count("<tr>") == 26
    assert '<td class="number" data-value="40000">40,000</td>' in table
    assert '<td data-value="yes">yes</td>' in table
    assert '<td class="number" data-value="">–</td>' in table
    # names that are too long for the chart are whole in the tooltip and in its table
    assert "<title>a selector with a very long name</title>a selector with a ver…" in text


def test_findings_with_seeds_give_the_whole_command() -> None:
    described = {**DESCRIBED, "methods": [], "seeds": 2, "data": "files"}
    experiment = EXAMPLE["Question"](fractions=(0.2, 1.0))
    said = words(render_findings(experiment, EXAMPLE["findings"](), described))
    assert "delible bench shares --model default --fractions 0.2,1.0 --seeds 2 --data files" in said
    assert "not recorded here" not in said
    assert "the experiment’s own choice" in said


def test_findings_may_be_empty_or_hostile() -> None:
    empty = render_findings(EXAMPLE["Question"](), Findings(rows=[]), DESCRIBED)
    assert "left no rows" in words(empty)
    nothing = Chart("t", "x", "y", [Curve("c", [(0.0, float("nan"))])])
    hostile = Findings(
        rows=[{HOSTILE: HOSTILE, "b": [1, HOSTILE]}],
        charts=[nothing, Chart(HOSTILE, HOSTILE, HOSTILE, [Curve(HOSTILE, [(0, 1), (1, 2)])])],
        notes=[HOSTILE],
    )
    text = render_findings(EXAMPLE["Question"](), hostile, DESCRIBED)
    checker = CHECKS["check"](text)
    assert checker.tags.count("svg") == 1
    assert checker.tags.count("script") == 1
    assert "img" not in checker.tags


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"), (True, "yes"), (2024, "2024"), (40_000, "40,000"), (0.12345, "0.123"),
        (float("nan"), "nan"), ((1, None), "1, –"), ("a", "a"),
    ],
)  # fmt: skip
def test_values_of_findings(value: Any, expected: str) -> None:
    assert text_of(value) == expected


def test_both_pages_are_written(tmp_path: Path) -> None:
    benchmark, cells = EXAMPLE["Example"](), EXAMPLE["cells"](["npo"], 1)
    table, common = tabulate(benchmark, cells), EXAMPLE["common"]()
    target = tmp_path / "leaderboard.html"
    assert write_page(target, benchmark, table, cells, common) == target
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    found = write_findings(tmp_path, EXAMPLE["Question"](), EXAMPLE["findings"](), DESCRIBED)
    assert found == tmp_path / "experiment.html"
    assert "Shares of the forget set" in found.read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "experiment.json").read_text(encoding="utf-8"))
    assert len(numbers["rows"]) == len(EXAMPLE["findings"]().rows)
    assert numbers["command"].startswith("delible bench shares --methods npo")
    assert {"versions", "hardware", "git_revision", "runs", "notes"} <= set(numbers)
    with pytest.raises(RunError, match="cannot be written"):
        write_page(tmp_path / "no" / "leaderboard.html", benchmark, table, cells, common)


# --- in the terminal -----------------------------------------------------------------------


def printed(drawn: Any, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get()


def test_the_terminal_shows_what_fits_and_says_what_does_not() -> None:
    table = tabulate(EXAMPLE["Example"](), EXAMPLE["cells"]())
    wide = printed(tables.leaderboard(table, 240), 240)
    assert "PrivLeak" in wide
    assert "seconds" in wide
    assert "more column" not in wide
    narrow = printed(tables.leaderboard(table, 60), 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "* 0.135 ± 0.033" in narrow
    assert "utility" in narrow
    assert "PrivLeak" not in narrow
    assert "10 more columns in the leaderboard's page" in " ".join(narrow.split())
    assert all(name in narrow for name in EXAMPLE["METHODS"])


def test_axes_come_before_earlier_columns_in_a_narrow_terminal() -> None:
    table = tabulate(EXAMPLE["Example"](), EXAMPLE["cells"]())
    turned = Table(tuple(reversed(table.columns)), table.rows)
    narrow = printed(tables.leaderboard(turned, 60), 60)
    assert "utility" in narrow
    assert "seconds" not in narrow


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"), (False, "no"), (3, "3"), (0.5, "0.500"), (0.0, "0.000"), (3.1e-9, "3.1e-09"),
        (123456.0, "1.23e+05"), ([1, 0.25], "1, 0.250"), ("npo", "npo"),
    ],
)  # fmt: skip
def test_cells_in_the_terminal(value: Any, expected: str) -> None:
    assert tables.cell(value) == expected
