"""The table of a leaderboard, and every run of it: texts, marks and what tooltips say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delible import registry
from delible.bench.table import ORIGINAL, REFERENCE, Number, Table, TableRow, shown, value_of
from delible.measure.benchmark import Column
from delible.report.ranking import BASELINES, Place, aim_of, axes_of

#: Under a column's title.
DIRECTIONS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "reference": "best at the reference",
}
BASELINE_WORDS = {ORIGINAL: "the model before", REFERENCE: "never saw what is forgotten"}


def named(method: str) -> str:
    """A method's name; of a recipe file its own name only."""
    file = registry.split_preset(method)[0].endswith((".yaml", ".yml"))
    return Path(method).name if file else method


def kind_of(method: str) -> str:
    """How a method is drawn: editors and guards look different from what trains."""
    if method in BASELINES:
        return "original" if method == ORIGINAL else "reference"
    kinds = {card.name: card.kind for card in registry.cards("editor", "guard")}
    return kinds.get(method, "method")


def table_of(
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
                "method": named(row.method),
                "kind": kind_of(row.method),
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


def unranked(table: Table) -> list[str]:
    """Columns that are best at a reference's value that is not there."""
    return [
        column.title
        for column in table.columns
        if column.better == "reference" and aim_of(table, column) is None
    ]


def runs_of(table: Table, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every run with its two axes and its cost."""
    columns = [column for column in axes_of(table) if column is not None]
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
                "method": named(str(cell["method"])),
                "task": str(cell["task"]),
                "seed": int(cell["seed"]),
                "numbers": numbers,
            }
        )
    return found
