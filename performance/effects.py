"""The pages in ``docs/results``: what every optimisation-based method does to a small world.

Reads the cells of a ``delible bench world`` run and writes two files: ``NAME.json``, the numbers,
and ``NAME.md``, the table, the tuned options, who earns the badge *effect*, and which claims of
papers about two methods show. Rows that the JSON file has and the run has not are kept, so a page
can be built up in several runs on the same kind of machine.

Run: delible bench world --model tiny --methods all-optimisation --seeds 3 --tune 8 \\
         --attacks relearn,quantize --out runs/effects
     python performance/effects.py runs/effects docs/results/optimisation-tiny.md

``--shapes docs/results/optimisation-tiny.json`` runs the benchmark itself, untuned, with the
options that were found there; learning rates are scaled by the ratio of the two models' budgets:

     python performance/effects.py runs/default docs/results/optimisation-default.md \\
         --shapes docs/results/optimisation-tiny.json --model default --methods npo,graddiff
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import machine, write

from delible.bench.run import bench, method_names
from delible.bench.table import (
    ORIGINAL,
    REFERENCE,
    Number,
    Table,
    TableRow,
    as_markdown,
    mean_of_runs,
    tabulate,
)
from delible.component import build
from delible.files import read_json
from delible.measure.benchmark import Benchmark
from delible.train.recipe import Recipe
from delible.watching import shown

FORGET, RETAIN = "answer_probability/forget", "answer_probability/retain"
NEIGHBOURS, GARBAGE = "answer_probability/neighbours", "outcome_shares/forget/garbage"
RELEARNED = "attack: relearn full, forget rows, 20 steps/recovered"
QUANTIZED = "attack: quantize 4 bit, groups of 64/recovered"
#: The badge: so much of the way from the original to the reference, and so much of the rest kept.
GAP, KEPT, BROKEN = 0.5, 0.9, 0.1
#: A difference between means must be larger than this to count, besides leaving both intervals.
LEAST = 0.01


@dataclass(frozen=True)
class Claim:
    """What a paper says of its method against the one that it builds on.

    Attributes:
        key: The number compared.
        sign: +1: the method's number should be higher, -1: lower.
    """

    method: str
    against: str
    says: str
    key: str
    sign: int


CLAIMS = (
    Claim("npo", "gradient_ascent", "keeps more while it forgets", RETAIN, 1),
    Claim("simnpo", "npo", "keeps more", RETAIN, 1),
    Claim("simnpo", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("npo_sam", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("npo_rs", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("npo_gp", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("npo_cr", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("npo_wa", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("ilu", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("lau_npo", "npo", "is harder to relearn", RELEARNED, -1),
    Claim("sure", "npo", "comes back less in 4 bit", QUANTIZED, -1),
    Claim("gru", "npo", "keeps more", RETAIN, 1),
    Claim("wagle", "npo", "keeps more", RETAIN, 1),
    Claim("melu", "npo", "keeps neighbours better", NEIGHBOURS, 1),
    Claim("guard", "graddiff", "keeps more", RETAIN, 1),
    Claim("wga", "graddiff", "keeps more", RETAIN, 1),
    Claim("satimp", "wga", "keeps more", RETAIN, 1),
    Claim("undial", "npo", "keeps more", RETAIN, 1),
    Claim("catnip", "gradient_ascent", "keeps more without retain rows", RETAIN, 1),
    Claim("pdu", "graddiff", "keeps more", RETAIN, 1),
    Claim("ceu", "gradient_ascent", "breaks fewer answers", GARBAGE, -1),
)


# ---- numbers of one table


def slim(benchmark: Benchmark, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells with the numbers of the table alone, to six digits."""
    kept = (
        "task", "method", "seed", "model", "options", "seconds", "peak_bytes", "notes", "failed",
    )  # fmt: skip
    keys = [column.key for column in tabulate(benchmark, cells).columns]
    return [
        {
            **{key: cell[key] for key in kept if key in cell},
            "numbers": {
                key: None if (value := cell["numbers"][key]) is None else float(f"{value:.6g}")
                for key in keys
                if key in cell["numbers"]
            },
        }
        for cell in cells
    ]


def shares(row: TableRow, original: TableRow, reference: TableRow) -> tuple[float, float] | None:
    """(how much of the way to the reference is gone, the least that is kept); None: no numbers."""
    parts = [(row.numbers[key].mean, original.numbers[key].mean) for key in (RETAIN, NEIGHBOURS)]
    here, before, never = (one.numbers[FORGET].mean for one in (row, original, reference))
    if here is None or before is None or never is None:
        return None
    kept = [after / start for after, start in parts if after is not None and start]
    return (before - here) / (before - never), min(kept)


def verdict(row: TableRow, original: TableRow, reference: TableRow) -> tuple[bool, str]:
    """Whether a row earns the badge *effect*, and why or why not."""
    if row.failed is not None:
        return False, f"failed: {row.failed}"
    found = shares(row, original, reference)
    if found is None:
        return False, "no numbers"
    gone, kept = found
    garbage = row.numbers[GARBAGE].mean or 0.0
    words = f"{100 * gone:.0f} % of the way, keeps {100 * kept:.0f} %"
    if garbage > BROKEN:
        return False, f"{words}, {100 * garbage:.0f} % garbage"
    return gone >= GAP and kept >= KEPT, words


def holds(claim: Claim, mine: Number, theirs: Number) -> str:
    """What the runs say of a claim: shows, does not show, or cannot be told."""
    if mine.mean is None or theirs.mean is None:
        return "not run"
    better = claim.sign * (mine.mean - theirs.mean)
    if mine.low is None or theirs.low is None or mine.high is None or theirs.high is None:
        return "one run: cannot be told"
    apart = mine.low > theirs.high or theirs.low > mine.high
    if abs(better) < LEAST or not apart:
        return "cannot be told"
    return "shows" if better > 0 else "**does not show**"


def summary(found: Mapping[str, Any]) -> Table:
    """The table of a JSON file's content: reference, original, then methods by name."""
    benchmark = build("benchmark", found["benchmark"])
    assert isinstance(benchmark, Benchmark)
    table = tabulate(benchmark, found["cells"])
    first = {REFERENCE: 0, ORIGINAL: 1}
    rows = sorted(table.rows, key=lambda row: (first.get(row.method, 2), row.method))
    return Table(table.columns, tuple(rows))


def earned(found: Mapping[str, Any]) -> set[str]:
    """The methods of a JSON file's content that earn the badge *effect*."""
    reference, original, *rows = summary(found).rows
    return {row.method for row in rows if verdict(row, original, reference)[0]}


# ---- the page


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    cells, table = found["cells"], summary(found)
    reference, original, *rows = table.rows
    seeds = 1 + max(int(cell["seed"]) for cell in cells)
    parts = [
        f"# Optimisation-based methods on `world`, model `{found['model']}`\n",
        f"Benchmark `world` with its defaults, {seeds} seed{'s' if seeds > 1 else ''}, "
        + (
            f"a search of {found['tune']} trials for every method, seed by seed the same options.\n"
            if found["tune"]
            else "with the options that a search found for another model (see below).\n"
        ),
        f"Machine: {machine(found['hardware'], 'thread(s) per process')}. *Seconds* are those "
        "of unlearning, without the search; *peak memory* is that of the whole process, which has "
        "run other methods before.\n",
        "Means over seeds, with half the width of the 95 % interval where there are several. "
        "After an attack, records are asked that the attack did not train on; *recovered* is the "
        "difference to the same records before it. Made by `performance/effects.py`, whose head "
        "has the commands.\n",
        as_markdown(table),
        "## Who shows an effect\n",
        f"The badge *effect* is for a method whose mean forget probability is at least "
        f"{100 * GAP:.0f} % of the way from the original to the retrained reference (over 100 %: "
        f"below a model that never knew), that keeps at least {100 * KEPT:.0f} % of the "
        f"probability of retained and of neighbouring answers, and that answers at most "
        f"{100 * BROKEN:.0f} % of the forgotten questions with garbage.\n",
        "| method | effect | numbers | options |",
        "|---|---|---|---|",
    ]
    for row in rows:
        shows, words = verdict(row, original, reference)
        cell = next(one for one in cells if one["method"] == row.method)
        options = cell.get("notes", {}).get("tuned") or cell.get("options", {})
        told = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in options.items())
        parts.append(f"| {row.method} | {'yes' if shows else 'no'} | {words} | {told} |")
    parts += [
        "",
        "## Claims of papers, at this scale\n",
        "Means over seeds with 95 % intervals; a claim shows, or does not, when the intervals are "
        f"apart and the means differ by more than {LEAST:g}. The two methods may forget to a "
        "different degree: read the table beside it.\n",
        "| method | against | the paper says that it | method | other | at this scale |",
        "|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        mine, theirs = (
            mean_of_runs([one["numbers"].get(claim.key) for one in cells if one["method"] == name])
            for name in (claim.method, claim.against)
        )
        parts.append(
            f"| {claim.method} | {claim.against} | {claim.says} | {_shown(mine)} | "
            f"{_shown(theirs)} | {holds(claim, mine, theirs)} |"
        )
    return "\n".join(parts) + "\n"


def _shown(number: Number) -> str:
    if number.mean is None:
        return "–"
    if number.low is None:
        return f"{number.mean:.3f}"
    return f"{number.mean:.3f} ± {number.mean - number.low:.3f}"


# ---- running with shapes that were found elsewhere


def shaped(found: Path, model: str, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by method: those found for another model, learning rates scaled to this one's."""
    kept = read_json(found)
    benchmark = build("benchmark", kept["benchmark"])
    assert isinstance(benchmark, Benchmark)
    theirs, ours = benchmark.budget(kept["model"]), benchmark.budget(model)
    ratio = float(ours["learning_rate"]) / float(theirs["learning_rate"])
    options: dict[str, dict[str, Any]] = {}
    for cell in kept["cells"]:
        if cell["method"] in methods and cell.get("notes", {}).get("tuned"):
            own = Recipe.named(cell["method"])
            options[cell["method"]] = {
                name: value * ratio if own.place_of(name) == "training.learning_rate" else value
                for name, value in cell["notes"]["tuned"].items()
                if name not in ours or own.place_of(name) == "training.learning_rate"
            }
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("--shapes", type=Path, help="JSON file with tuned options; runs first")
    parser.add_argument("--model", default="default", help="with --shapes")
    parser.add_argument("--methods", default="all-optimisation", help="with --shapes")
    given = parser.parse_args()
    if given.shapes is not None:
        methods = method_names(given.methods.split(","))
        # what failed has no file, so that the next run tries again, but it has its row here
        with shown(print):
            run = bench(
                "world", methods=methods, model=given.model, attacks=["relearn", "quantize"],
                options=shaped(given.shapes, given.model, methods), out=given.run,
            ).cells  # fmt: skip
    else:
        run = [read_json(path) for path in (given.run / "cells").glob("*.json")]
    described = read_json(given.run / "bench.json")
    benchmark = build("benchmark", described["benchmark"])
    cells = slim(benchmark, run)
    numbers = given.page.with_suffix(".json")
    if numbers.exists():
        there = {cell["method"] for cell in cells}
        before = read_json(numbers)
        for key in ("benchmark", "model", "tune"):
            if before[key] != described[key]:
                raise SystemExit(f"{numbers} is of another {key}: {before[key]}.")
        cells += [cell for cell in before["cells"] if cell["method"] not in there]
    found = {
        **{key: described[key] for key in ("benchmark", "model", "tune", "versions", "hardware")},
        "cells": sorted(cells, key=lambda cell: (cell["method"], cell["seed"])),
    }
    write(given.page, found, page(found))
    print(given.page)


if __name__ == "__main__":
    main()
