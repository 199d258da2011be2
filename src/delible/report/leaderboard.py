"""The leaderboard of ``delible bench``: one page about what methods do to a benchmark's tasks.

A single file like the report: no network, no fonts, readable without JavaScript. The prose is in
``leaderboard.html.j2``, which method is best in ``ranking.py``, the table in ``board.py``, the
pictures in ``board_pictures.py``, what failed in ``troubles.py``; this file puts them together.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delible.bench.table import REFERENCE, Table
from delible.measure.benchmark import Benchmark
from delible.measure.evaluate import Ask
from delible.report import html
from delible.report.board import named, runs_of, table_of, unranked
from delible.report.board_pictures import from_task_to_task, trade_off
from delible.report.origin import flags, machine, options_of
from delible.report.panels import panels
from delible.report.ranking import BASELINES, axes_of, methods_of, places, row_of
from delible.report.troubles import failures, skipped, stops, which, without_value
from delible.report.words import text_of
from delible.rundir import hardware, versions


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
        chart=trade_off(table),
        panels=panels(from_task_to_task(benchmark, table, cells)),
        along=benchmark.along(),
        board=table_of(table, cells, marks),
        levels="level" in marks.values(),
        unranked=unranked(table),
        failures=failures(cells),
        valueless=without_value(cells),
        skipped=skipped(cells),
        stops=stops(cells),
        runs=runs_of(table, cells),
        axes=[column for column in axes_of(table) if column is not None],
        asked=[_asked(ask) for ask in benchmark.asks()],
        options=options_of(benchmark),
        budget={key: text_of(value) for key, value in budget.items()},
        own_options=_own_options(cells),
        tuned=_tuned(cells),
        common=common,
        command=_bench_command(benchmark, common, methods, seeds),
        versions=common.get("versions") or versions(),
        hardware=machine(common.get("hardware") or hardware()),
    )  # fmt: skip


def _tuned(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Options that a search found, by run."""
    return [
        {
            "run": f"{named(str(cell['method']))}, {which([cell])}",
            "options": json.dumps(tuned, ensure_ascii=False, default=str),
        }
        for cell in cells
        if (tuned := cell.get("notes", {}).get("tuned"))
    ]


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
        named(str(cell["method"])): json.dumps(cell["options"], ensure_ascii=False, default=str)
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
