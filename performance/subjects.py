"""Pages such as ``docs/results/editing.md``: methods by how many people are to be forgotten.

Reads folders of ``delible bench world`` runs that differ in the number of people alone, and writes
``NAME.json``, the numbers, and ``NAME.md``: a table per number of people, and what becomes of each
method as the number grows. Runs that the JSON file has and that are not named now stay.

Run: delible bench world --people 40 --forget 1 --methods rome,memit --out runs/one
     delible bench world --people 40 --forget 5 --methods rome,memit --out runs/five
     python performance/subjects.py docs/results/editing.md runs/one runs/five --title "Editors"
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effects import FORGET, GARBAGE, NEIGHBOURS, QUANTIZED, RELEARNED, RETAIN, slim, verdict
from pages import machine, write

from delible.bench.table import ORIGINAL, REFERENCE, Table, TableRow, tabulate
from delible.component import build
from delible.errors import RunError
from delible.files import read_json
from delible.measure.benchmark import Benchmark

#: What the tables show: the key of a number, and its heading.
COLUMNS = (
    (FORGET, "forget probability"),
    ("rouge_l_recall/forget", "forget ROUGE-L"),
    ("paraphrase_probability/forget", "paraphrased"),
    ("choice_accuracy/forget_choice", "choice"),
    (RETAIN, "retain probability"),
    (NEIGHBOURS, "neighbours"),
    ("answer_probability/general", "general"),
    (GARBAGE, "garbage"),
    (RELEARNED, "recovered by relearning"),
    (QUANTIZED, "recovered by 4 bit"),
)


def read(folder: Path) -> dict[str, Any]:
    """The numbers of one run.

    Raises:
        RunError: It has no cells.
    """
    described = read_json(folder / "bench.json")
    run = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    if not run:
        raise RunError("the run has no results yet.", where=str(folder))
    kept = ("benchmark", "model", "tune", "versions", "hardware")
    benchmark = build("benchmark", described["benchmark"])
    return {**{key: described[key] for key in kept}, "cells": slim(benchmark, run)}


def ordered(run: Mapping[str, Any]) -> Table:
    """Its table: reference, original, then methods by name."""
    benchmark = build("benchmark", run["benchmark"])
    assert isinstance(benchmark, Benchmark)
    table = tabulate(benchmark, run["cells"])
    first = {REFERENCE: 0, ORIGINAL: 1}
    rows = sorted(table.rows, key=lambda row: (first.get(row.method, 2), row.method))
    return Table(table.columns, tuple(rows))


def forgotten(run: Mapping[str, Any]) -> int:
    """How many people were to be forgotten."""
    return int(run["benchmark"]["forget"])


def section(run: Mapping[str, Any]) -> list[str]:
    """The table of one run."""
    reference, original, *rows = ordered(run).rows
    known = {key for row in (reference, original, *rows) for key in row.numbers}
    columns = [(key, title) for key, title in COLUMNS if key in known]
    people, count = run["benchmark"]["people"], forgotten(run)
    lines = [
        f"## {count} of {people} people\n",
        f"| method | {' | '.join(title for _, title in columns)} | seconds | peak GiB | effect |",
        f"|{'---|' * (len(columns) + 4)}",
    ]
    for row in (reference, original, *rows):
        if row.failed is not None:
            lines.append(f"| {row.method} | failed: {row.failed} |")
            continue
        cell = next(one for one in run["cells"] if one["method"] == row.method)
        numbers = [_shown(row, key) for key, _ in columns]
        seconds, peak = cell.get("seconds"), cell.get("peak_bytes")
        effect = "" if row in (reference, original) else _effect(row, original, reference)
        numbers += [
            "–" if seconds is None else f"{seconds:.1f}",
            f"{peak / 2**30:.1f}" if peak else "–",
        ]
        lines.append(f"| {row.method} | {' | '.join(numbers)} | {effect} |")
    return [*lines, ""]


def _effect(row: TableRow, original: TableRow, reference: TableRow) -> str:
    shows, words = verdict(row, original, reference)
    return f"{'**yes**' if shows else 'no'}: {words}"


def _shown(row: TableRow, key: str) -> str:
    number = row.numbers.get(key)
    if number is None or number.mean is None:
        return "–"
    spread = f" ± {number.mean - number.low:.3f}" if number.low is not None else ""
    return f"{number.mean:.3f}{spread}"


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    runs: Sequence[Mapping[str, Any]] = sorted(found["runs"], key=forgotten)
    first = runs[0]
    seeds = 1 + max(int(cell["seed"]) for run in runs for cell in run["cells"])
    parts = [
        f"# {found['title']} on `world`, model `{first['model']}`\n",
        f"A model is taught a made-up world; each method forgets some people of it with its own "
        f"defaults, {seeds} seed{'s' if seeds > 1 else ''}. The *retrained reference* never saw "
        "them. *Effect* is earned by half of the way from the original to the reference with nine "
        "tenths of retained and neighbouring answers kept and at most a tenth of the forgotten "
        "questions answered with garbage. *Recovered* is the rise of answer probability, on "
        "records that the attack did not train on.\n",
        f"Machine: {machine(first['hardware'])}; other work ran beside it, so *seconds*, which are "
        "those of forgetting, are an upper bound. Made by `performance/subjects.py`, whose head "
        "has the commands.\n",
    ]
    for run in runs:
        parts += section(run)
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs")
    parser.add_argument("--title", help="what the methods have in common; once")
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {"title": "Methods", "runs": []}
    found["title"] = given.title or found["title"]
    for run in map(read, given.runs):
        others = [one for one in found["runs"] if one["benchmark"] != run["benchmark"]]
        found["runs"] = [*others, run]
    write(given.page, found, page(found))
    print(given.page)


if __name__ == "__main__":
    main()
