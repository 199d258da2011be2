"""The page ``docs/results/continual.md``: many requests, one after the other.

Reads folders of finished ``delible bench continual`` runs, one per model, and writes ``NAME.json``,
the numbers, and ``NAME.md``: a table per model, what the run says, and whether papers' claims show.
Models that the JSON file has and that are not named now stay.

Run: delible bench continual --methods o3,fit,uld,npo --model tiny --seeds 3 --out runs/continual
     python performance/continual_page.py docs/results/continual.md runs/continual
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evidence import INFINITE, Claim, Entry, over_seeds
from pages import claims_table, machine, revision, write

from delible.bench.table import Number
from delible.errors import RunError
from delible.experiments.continual.findings import REFERENCE, degree
from delible.files import read_json

KEPT = ("model", "rows", "runs", "notes", "command", "seconds", "hardware", "git_revision",
        "versions")  # fmt: skip
COLUMNS = {
    "forget degree": 2, "retain utility": 2, "forget score": 1, "retain score": 1,
    "seconds per request": 1, "peak GiB": 1, "skipped": 0,
}  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """The numbers of one run.

    Raises:
        RunError: It has not ended.
    """
    file = folder / "experiment.json"
    if not file.is_file():
        raise RunError("it holds no experiment.json; has the run ended?", where=str(folder))
    found = read_json(file)
    return {key: found[key] for key in KEPT if key in found}


def last(method: str, split: str) -> Callable[[Entry], Number]:
    """Forget degree or retain utility after the last request, seed by seed."""

    def number(entry: Entry, seed: int) -> float | None:
        end = max(run["requests"] for run in entry.runs)
        mine = entry.one(seed, method=method, requests=end)
        reference = entry.one(method=REFERENCE, requests=end)
        if mine is None or reference is None:
            return None
        return degree(mine[f"{split} score"], reference[f"{split} score"])

    return over_seeds(number)


CLAIMS = (
    Claim("FIT keeps what stays after many requests", "retain utility of fit, last point",
          0.8, INFINITE, last("fit", "retain")),
    Claim("FIT forgets", "forget degree of fit, last point", 0.7, INFINITE, last("fit", "forget")),
    Claim("plain NPO wears the model out", "retain utility of npo, last point", -INFINITE, 0.5,
          last("npo", "retain")),
    Claim("O3 keeps what stays", "retain utility of o3, last point", 0.8, INFINITE,
          last("o3", "retain")),
)  # fmt: skip


def section(run: Mapping[str, Any]) -> list[str]:
    """The table of one model, and what its run says."""

    def cell(row: Mapping[str, Any], key: str, digits: int) -> str:
        return "–" if row.get(key) is None else f"{row[key]:.{digits}f}"

    return [
        f"## Model `{run['model']}`\n",
        f"| method | requests | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (2 + len(COLUMNS))}",
        *(
            f"| {row['method']} | {row['requests']} "
            f"| {' | '.join(cell(row, key, digits) for key, digits in COLUMNS.items())} |"
            for row in run["rows"]
        ),
        "",
        *(f"- {note}" for note in run["notes"]),
        f"\n`{run['command']}`: {run['seconds'] / 60:.0f} minutes (other work on the machine "
        f"included) on {machine(run['hardware'])}, revision {revision(run['git_revision'])}.\n",
    ]


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    runs = sorted(found["runs"], key=lambda run: str(run["model"]), reverse=True)
    parts = [
        "# Continual: many requests, against retraining\n",
        "Made-up items (personal files, openings of books, recipes) are deleted one by one from a "
        "model that has learned them and as many that stay. At each point of the table the model "
        "is compared with one that was trained without what is deleted so far: *forget degree* and "
        "*retain utility* are 1 where as much is left as there, and lower on both sides; a score "
        "is a mean of measures, in [0, 100]. After every request all earlier ones are asked "
        "again. `o3` teaches NPO here, since a passage has no question that could be declined. "
        "Made by `performance/continual_page.py`, whose head has the commands.\n",
    ]
    for run in runs:
        parts += section(run)
    found_by_model = {run["model"]: [claim.number(_entry(run)) for claim in CLAIMS] for run in runs}
    parts += [
        "## What papers claim, and what shows here\n",
        "FIT: arXiv 2601.21682, with 6 to 14 billion weights. O3: arXiv 2407.10223, with 7 "
        "billion.\n",
        *claims_table(CLAIMS, found_by_model),
    ]
    return "\n".join(parts) + "\n"


def _entry(run: Mapping[str, Any]) -> Entry:
    return Entry(run["runs"], 1 + max(one["seed"] for one in run["runs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {"runs": []}
    for run in map(read, given.runs):
        found["runs"] = [*(one for one in found["runs"] if one["model"] != run["model"]), run]
    write(given.page, found, page(found))
    print(given.page)


if __name__ == "__main__":
    main()
