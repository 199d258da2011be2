"""The leaderboard of ``delible bench``: one page about what methods do to a benchmark's tasks.

A single file like the report: no network, no fonts, readable without JavaScript. The prose is in
``leaderboard.html.j2``, the drawing in ``charts.py``, which method is best in ``ranking.py``; this
file turns cells and tables into what the page shows.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delible import registry
from delible.bench.table import ORIGINAL, REFERENCE, Number, Table, TableRow, shown, value_of
from delible.measure.benchmark import (
    Benchmark,
    Chart,
    Column,
    Curve,
)
from delible.measure.evaluate import Ask
from delible.report import charts, html
from delible.report.origin import flags, machine, options_of
from delible.report.panels import panels
from delible.report.ranking import (
    BASELINES,
    Place,
    aim_of,
    axis_of,
    front,
    methods_of,
    places,
    row_of,
)  # fmt: skip
from delible.rundir import hardware, versions

#: More methods than these carry numbers instead of names in the chart.
MOST_NAMES = 16
#: Under a column's title.
DIRECTIONS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "reference": "best at the reference",
}
BASELINE_WORDS = {ORIGINAL: "the model before", REFERENCE: "never saw what is forgotten"}


def write_page(
    folder_file: Path,
    benchmark: Benchmark,
    table: Table,
    cells: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
) -> Path:
    """Writes the leaderboard.

    Args:
        folder_file: The page's file; its folder exists.
        table: Mean and interval of every column, by method.
        cells: Finished cells, which may be part of all.
        common: What all cells share: ``model``, ``data``, ``attacks``, ``tune``; and
            ``versions`` and ``hardware``, which are this machine's where they are missing.

    Returns:
        The file.

    Raises:
        RunError: It cannot be written.
    """
    return html.write(render_page(benchmark, table, cells, common), folder_file)


def render_page(
    benchmark: Benchmark,
    table: Table,
    cells: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
) -> str:
    """The leaderboard as HTML text."""
    methods = [row.method for row in methods_of(table)]
    seeds = sorted({int(cell["seed"]) for cell in cells if cell["method"] not in BASELINES})
    marks, budget = places(table), benchmark.budget(str(common["model"]))
    return html.environment().get_template("leaderboard.html.j2").render(
        card=benchmark.card,
        model=str(common["model"]),
        methods=methods,
        tasks=list(dict.fromkeys(str(cell["task"]) for cell in cells)),
        seeds=seeds,
        finished=len(cells),
        has_reference=row_of(table, REFERENCE) is not None,
        chart=_chart(table),
        panels=panels(_curves(benchmark, table, cells)),
        along=benchmark.along(),
        board=_board(table, cells, marks),
        levels="level" in marks.values(),
        unranked=_unranked(table),
        failures=_failures(cells),
        valueless=_valueless(cells),
        skipped=_skipped(cells),
        stops=_stops(cells),
        runs=_runs(table, cells),
        axes=[column for column in _axes(table) if column is not None],
        asked=[_asked(ask) for ask in benchmark.asks()],
        options=options_of(benchmark),
        budget={key: html.text_of(value) for key, value in budget.items()},
        own_options=_own_options(cells),
        tuned=_tuned(cells),
        common=common,
        command=_bench_command(benchmark, common, methods, seeds),
        versions=common.get("versions") or versions(),
        hardware=machine(common.get("hardware") or hardware()),
    )  # fmt: skip


# --- the chart -----------------------------------------------------------------------------


def _axes(table: Table) -> tuple[Column | None, Column | None]:
    return axis_of(table, "forget"), axis_of(table, "utility")


def _kind(method: str) -> str:
    """How a method is drawn: editors and guards look different from what trains."""
    if method in BASELINES:
        return "original" if method == ORIGINAL else "reference"
    kinds = {card.name: card.kind for card in registry.cards("editor", "guard")}
    return kinds.get(method, "method")


def _interval(number: Number, scale: float) -> tuple[float, float] | None:
    if number.low is None or number.high is None:
        return None
    ends = (scale * number.low, scale * number.high)
    return ends if all(map(charts.finite, ends)) and ends[0] < ends[1] else None


def _chart(table: Table) -> dict[str, Any] | None:
    """Forgetting against utility, drawn for wide and for narrow screens."""
    forget, utility = _axes(table)
    if forget is None or utility is None:
        return None
    scales = [100.0 if column.percent else 1.0 for column in (forget, utility)]
    spots: list[charts.Spot] = []
    missing: list[str] = []
    y_line: float | None = None
    for row in table.rows:
        x, y = row.numbers[forget.key], row.numbers[utility.key]
        if not (charts.finite(x.mean) and charts.finite(y.mean)):
            missing.append(row.method)
            if row.method == REFERENCE and y.mean is not None and charts.finite(y.mean):
                y_line = scales[1] * y.mean
            continue
        assert x.mean is not None
        assert y.mean is not None
        kind = _kind(row.method)
        badge = str(1 + sum(spot.kind not in ("original", "reference") for spot in spots))
        spots.append(
            charts.Spot(
                scales[0] * x.mean,
                scales[1] * y.mean,
                kind,
                _named(row.method),
                kind if kind in ("original", "reference") else badge,
                f"{_named(row.method)}: {forget.title} {shown(x, forget)}, "
                f"{utility.title} {shown(y, utility)}",
                _interval(x, scales[0]),
                _interval(y, scales[1]),
            )
        )
    if len(spots) < 2:
        return None
    aim = aim_of(table, forget)
    drawn = [spot for spot in spots if spot.kind not in ("original", "reference")]
    numbered = len(drawn) > MOST_NAMES
    x_label = f"{forget.title}{', %' if forget.percent else ''}  ({_arrow(forget, aim)})"
    y_label = f"{utility.title}{', %' if utility.percent else ''}  (↑ higher is better)"
    svgs = [
        charts.methods(
            spots,
            identifier=f"trade-{name}",
            title=f"{forget.title} against {utility.title}",
            description="; ".join(spot.title for spot in spots),
            x_label=x_label,
            y_label=y_label,
            size=size,
            numbered=numbered or name == "narrow",
            x_line=None if aim is None else scales[0] * aim,
            y_line=y_line,
            from_zero=all(spot.x >= 0 for spot in spots) and forget.better != "higher",
        )
        for name, size in (("wide", (760.0, 470.0)), ("narrow", (400.0, 400.0)))
    ]
    return {
        "wide": svgs[0],
        "narrow": svgs[1],
        "key": [
            {
                "name": spot.name,
                "kind": spot.kind,
                "x": f"{spot.x:.{_digits(forget)}f}",
                "y": f"{spot.y:.{_digits(utility)}f}",
            }
            for spot in drawn
        ],
        "numbered": numbered,
        "kinds": list(dict.fromkeys(spot.kind for spot in spots)),
        "bars": any(spot.x_interval or spot.y_interval for spot in spots),
        "forget": forget,
        "utility": utility,
        "aim": aim,
        "missing": [_named(name) for name in missing],
        "front": [_named(name) for name in front(table)],
    }


def _curves(benchmark: Benchmark, table: Table, cells: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Both axes over tasks that have an order: per method the mean over seeds at each task."""
    label = benchmark.along()
    found: list[Chart] = []
    for column in _axes(table) if label is not None else ():
        if column is None:
            continue
        curves = []
        for row in table.rows:
            values: dict[int, list[float]] = {}
            for cell in cells:
                number, value = _last_number(str(cell["task"])), value_of(cell, column.key)
                if cell["method"] == row.method and number is not None and value is not None:
                    scaled = 100 * value if column.percent else value
                    values.setdefault(number, []).append(scaled)
            points = [(float(at), sum(here) / len(here)) for at, here in sorted(values.items())]
            curves.append(Curve(_named(row.method), points))
        title = f"{column.title}{', %' if column.percent else ''}"
        if any(len(curve.points) > 1 for curve in curves):
            found.append(Chart(title, str(label), title, curves))
    return found


def _last_number(name: str) -> int | None:
    found = re.search(r"(\d+)$", name)
    return None if found is None else int(found[1])


def _digits(column: Column) -> int:
    return 1 if column.percent else 3


def _arrow(column: Column, aim: float | None) -> str:
    if column.better == "lower":
        return "← lower is better"
    if column.better == "higher":
        return "higher is better →"
    return "nearest to the reference is best" if aim is not None else "best: unknown, no reference"


# --- the table -----------------------------------------------------------------------------


def _named(method: str) -> str:
    """A method's name; of a recipe file its own name only."""
    file = registry.split_preset(method)[0].endswith((".yaml", ".yml"))
    return Path(method).name if file else method


def _board(
    table: Table,
    cells: Sequence[Mapping[str, Any]],
    marks: Mapping[tuple[str, str], Place],
) -> dict[str, Any]:
    """Head and rows of the table; every cell with its text, its mark and what its tooltip says."""
    heads = []
    for column in table.columns:
        aim = aim_of(table, column)
        direction = DIRECTIONS[column.better]
        if column.better == "reference" and aim is None:
            direction = "no reference here"
        heads.append(
            {
                "title": column.title + (", %" if column.percent else ""),
                "direction": direction,
                "key": column.key,
                "axis": column.axis,
            }
        )
    rows = []
    for row in table.rows:
        # a step on the way to the next task is not measured: it is no run of its own
        mine = [
            cell
            for cell in cells
            if cell["method"] == row.method and (cell["numbers"] or "failed" in cell)
        ]
        broken = sum("failed" in cell for cell in mine)
        rows.append(
            {
                "method": _named(row.method),
                "kind": _kind(row.method),
                "baseline": BASELINE_WORDS.get(row.method),
                "runs": len(mine),
                "broken": broken,
                "cells": [
                    _board_cell(row, column, len(mine), marks.get((row.method, column.key)))
                    for column in table.columns
                ],
            }
        )
    return {"heads": heads, "rows": rows}


def _board_cell(row: TableRow, column: Column, runs: int, mark: Place | None) -> dict[str, Any]:
    number = row.numbers[column.key]
    mean, sep, half = shown(number, column).partition(" ± ")
    if number.mean is None:
        reason = "no run has a value"
        if row.failed is not None:
            reason = f"failed: {row.failed}"
        elif row.method == REFERENCE:
            reason = "not measured, or a comparison of the reference with itself"
    else:
        reason = f"mean {number.mean:.6g} of {number.runs} {'run' if number.runs == 1 else 'runs'}"
        if number.low is not None and number.high is not None:
            reason += f"; 95 % interval {number.low:.6g} to {number.high:.6g}"
    few = number.mean is not None and number.runs < runs
    return {
        "value": "" if number.mean is None else repr(number.mean),
        "mean": mean,
        "half": half if sep else None,
        "reason": reason,
        "mark": mark,
        "few": f"{number.runs} of {runs} runs" if few else None,
    }


def _unranked(table: Table) -> list[str]:
    """Columns that are best at a reference's value that is not there."""
    return [
        column.title
        for column in table.columns
        if column.better == "reference" and aim_of(table, column) is None
    ]


# --- what did not work ---------------------------------------------------------------------


def _failures(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Failed runs by method and reason."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if "failed" in cell:
            found.setdefault((str(cell["method"]), str(cell["failed"])), []).append(cell)
    return [
        {"method": _named(method), "reason": reason, "runs": _which(group)}
        for (method, reason), group in found.items()
    ]


def _which(cells: Sequence[Mapping[str, Any]]) -> str:
    """Tasks and seeds in words: ``forget01: seeds 0, 2``."""
    by_task: dict[str, list[int]] = {}
    for cell in cells:
        by_task.setdefault(str(cell["task"]), []).append(int(cell["seed"]))
    return "; ".join(
        f"{task}: seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, sorted(seeds)))}"
        for task, seeds in by_task.items()
    )


def _valueless(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without a value, by method and measure: how many, of how many, and why."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        for key, count in cell.get("counts", {}).items():
            method = str(cell["method"])
            entry = found.setdefault((method, key), {"count": 0, "total": 0, "why": Counter()})
            entry["count"] += count
            label, _, split = str(key).rpartition("/")
            items = cell.get("values", {}).get("items", {}).get(label, {}).get(split, [])
            entry["total"] += len(items)
            entry["why"].update(str(reason) for value, reason, _ in items if value is None)
    return [
        {
            "method": _named(method),
            "key": key,
            "count": entry["count"],
            "total": entry["total"] or None,
            "why": [f"{reason} ({count:,})" for reason, count in entry["why"].most_common(2)],
            "more": max(0, len(entry["why"]) - 2),
        }
        for (method, key), entry in found.items()
    ]


def _skipped(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that were not measured, by reason, and on which methods."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        for metric, reason in cell.get("skipped", {}).items():
            methods = found.setdefault((str(metric), str(reason)), {})
            methods[_named(str(cell["method"]))] = None
    return [
        {"metric": metric, "reason": reason, "methods": list(methods)}
        for (metric, reason), methods in found.items()
    ]


def _stops(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose training stopped early, by method and reason."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        stopped = cell.get("notes", {}).get("stopped")
        if stopped:
            found.setdefault((str(cell["method"]), str(stopped)), []).append(cell)
    return [
        {"method": _named(method), "reason": reason, "runs": _which(group)}
        for (method, reason), group in found.items()
    ]


def _tuned(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Options that a search found, by run."""
    return [
        {
            "run": f"{_named(str(cell['method']))}, {_which([cell])}",
            "options": json.dumps(tuned, ensure_ascii=False, default=str),
        }
        for cell in cells
        if (tuned := cell.get("notes", {}).get("tuned"))
    ]


def _runs(table: Table, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every run with its two axes and its cost."""
    columns = [column for column in _axes(table) if column is not None]
    costs = [column for column in table.columns if column.key in ("seconds", "peak_gib")]
    found = []
    for cell in cells:
        values = [value_of(cell, column.key) for column in columns]
        numbers = [
            (
                "" if value is None else repr(value),
                shown(Number(value, runs=1), column),
                "failed: " + str(cell["failed"]) if "failed" in cell else "this run has no value",
            )
            for column, value in zip(
                (*columns, *costs),
                (*values, *(value_of(cell, column.key) for column in costs)),
                strict=True,
            )
        ]
        found.append(
            {
                "method": _named(str(cell["method"])),
                "task": str(cell["task"]),
                "seed": int(cell["seed"]),
                "numbers": numbers,
            }
        )
    return found


# --- how it was made -----------------------------------------------------------------------


def _asked(ask: Ask) -> dict[str, Any]:
    card = ask.metric.card
    return {
        "title": card.title,
        "label": ask.name,
        "splits": ", ".join(ask.splits) if ask.splits else "what it needs",
        "direction": card.direction or "",
        "misleads": card.misleads or "",
    }


def _own_options(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Options of single methods, where cells carry them."""
    return {
        _named(str(cell["method"])): json.dumps(cell["options"], ensure_ascii=False, default=str)
        for cell in cells
        if cell.get("options")
    }


def _bench_command(
    benchmark: Benchmark, common: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int]
) -> str:
    words = ["delible", "bench", benchmark.card.name]
    if methods:
        words += ["--methods", ",".join(methods)]
    words += ["--model", str(common["model"]), *flags(benchmark)]
    if seeds:
        words += ["--seeds", str(max(seeds) + 1)]
    if common.get("data"):
        words += ["--data", str(common["data"])]
    for attack in common.get("attacks") or ():
        words += ["--attacks", json.dumps(attack, ensure_ascii=False)]
    if common.get("tune"):
        words += ["--tune", str(common["tune"])]
    return shlex.join(words)
