"""The page ``docs/results/onpolicy.md``: methods that learn from the model's own answers.

Reads folders of ``delible bench world`` runs, one per model with and without ``--tune``, and of
``delible bench battery`` runs, for the verdicts. Writes ``NAME.json``, the numbers of every cell,
and ``NAME.md``: a table per run, and for each paper whether its direction shows. Runs that the JSON
file has and that are not named now stay.

Run: delible bench world --model tiny --seeds 3 --out runs/onpolicy-tiny \\
         --methods rule,purge,reinvent,rejection_finetuning,on_policy_dpo,npo,idk
     delible bench battery --model tiny --out runs/onpolicy-audits \\
         --methods rule,purge,reinvent,rejection_finetuning,on_policy_dpo,npo,idk
     python performance/onpolicy_page.py docs/results/onpolicy.md runs/onpolicy-tiny \\
         --audits runs/onpolicy-audits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence import INFINITE, Claim, Entry, over_seeds
from pages import claims_table, machine, revision, write

from delible.bench.table import ORIGINAL, REFERENCE, Number, mean_of_runs
from delible.errors import RunError
from delible.files import read_json
from delible.rundir import git_revision

SAID = "outcome_shares/forget/correct"
REFUSED = "outcome_shares/forget/refusal"
OVER_REFUSED = "outcome_shares/neighbours/refusal"
#: Keys of a cell's numbers, and the table's headings.
COLUMNS = {
    SAID: "says it",
    "paraphrase_probability/forget": "in other words",
    "rouge_l_recall/forget_reverse": "asked in reverse",
    "answer_probability/forget": "forget probability",
    REFUSED: "refuses it",
    OVER_REFUSED: "refuses neighbours",
    "rouge_l_recall/neighbours": "neighbours ROUGE-L",
    "answer_probability/retain": "retain probability",
    "answer_probability/general": "general probability",
    "outcome_shares/forget/garbage": "garbage",
}
OWN_ANSWERS = ("rule", "purge", "reinvent", "rejection_finetuning", "on_policy_dpo")


def read(folder: Path) -> dict[str, Any]:
    """The numbers of one run.

    Raises:
        RunError: It has no cells.
    """
    described = read_json(folder / "bench.json")
    cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        raise RunError("the run has no results yet.", where=str(folder))
    kept = ("benchmark", "model", "tune", "versions", "hardware")
    return {**{key: described[key] for key in kept}, "git": git_revision(),
            "cells": [_slim(cell) for cell in cells]}  # fmt: skip


def _slim(cell: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        key: float(f"{value:.6g}")
        for key in COLUMNS
        if (value := cell["numbers"].get(key)) is not None
    }
    kept = ("method", "seed", "seconds", "peak_bytes", "notes", "failed")
    return {**{key: cell[key] for key in kept if key in cell}, "numbers": numbers}


def verdicts(folder: Path) -> dict[str, str]:
    """What an audit of each method says, by method.

    Raises:
        RunError: The run has not ended.
    """
    file = folder / "experiment.json"
    if not file.is_file():
        raise RunError("it holds no experiment.json; has the run ended?", where=str(folder))
    found = read_json(file)
    depth = found["experiment"]["depth"]
    return {row["method"]: f"{row['verdict']} ({depth})" for row in found["rows"]}


def _of(cells: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [one["numbers"][key] for one in cells if key in one["numbers"]]


def section(run: Mapping[str, Any], audits: Mapping[str, str]) -> list[str]:
    """The table of one model."""
    cells = run["cells"]
    names = dict.fromkeys([REFERENCE, ORIGINAL, *sorted(one["method"] for one in cells)])
    known = [key for key in COLUMNS if any(key in one["numbers"] for one in cells)]
    world = run["benchmark"]
    seeds = _seeds(run)
    lines = [
        f"## {_title(run)}\n",
        f"{world['people']} people, {world['forget']} of them to forget. "
        f"{machine(run['hardware'])}; other work ran beside it. Code: {revision(run['git'])}.\n",
        f"| method | {' | '.join(COLUMNS[key] for key in known)} | generated tokens | steps "
        "| seconds | audit says |",
        f"|{'---|' * (len(known) + 5)}",
    ]
    for name in names:
        mine = [one for one in cells if one["method"] == name]
        done = [one for one in mine if not one.get("failed")]
        if not mine:
            continue
        if not done:
            lines.append(f"| {name} | failed: {mine[0]['failed']} |")
            continue
        shown = [_shown(mean_of_runs(_of(done, key))) for key in known]
        told = [_mean([one["notes"].get(key) for one in done])
                for key in ("generated_tokens", "steps")]  # fmt: skip
        seconds = _mean([one["seconds"] for one in done])
        plain = name in (REFERENCE, ORIGINAL)
        ended = "" if plain or len(done) == seeds else f" ({len(done)} of {seeds} seeds)"
        lines.append(
            f"| {name}{ended} | {' | '.join(shown)} | {' | '.join(told)} "
            f"| {'–' if plain else seconds} | {audits.get(name, '–')} |"
        )
    return [*lines, ""]


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):,.0f}" if there else "–"


def _shown(number: Number) -> str:
    if number.mean is None:
        return "–"
    spread = f" ± {number.mean - number.low:.2f}" if number.low is not None else ""
    return f"{number.mean:.2f}{spread}"


def less(key: str, method: str, than: str) -> Callable[[Entry], Number]:
    """How much lower a method's number is than another's, seed by seed."""

    def number(entry: Entry, seed: int) -> float | None:
        mine = entry.one(seed, method=method)
        other = entry.one(0 if than in (ORIGINAL, REFERENCE) else seed, method=than)
        values = [None if one is None else one["numbers"].get(key) for one in (mine, other)]
        return None if None in values else values[1] - values[0]  # type: ignore[operator]

    return over_seeds(number)


CLAIMS = (
    Claim("RULE (2506.07171): a boundary set keeps refusals off neighbours",
          "neighbours refused, idk minus rule", 0, INFINITE, less(OVER_REFUSED, "rule", "idk")),
    Claim("RULE: the forget questions are not answered any more",
          "says it, the original minus rule", 0.5, INFINITE, less(SAID, "rule", ORIGINAL)),
    Claim("PURGE (2601.20568): what is forbidden is said less",
          "says it, the original minus purge", 0.5, INFINITE, less(SAID, "purge", ORIGINAL)),
    Claim("PURGE: less too where nobody trained on the answer",
          "probability in other words, the original minus purge", 0, INFINITE,
          less("paraphrase_probability/forget", "purge", ORIGINAL)),
    Claim("PURGE: more than the best of as many answers teaches",
          "says it, rejection_finetuning minus purge", 0, INFINITE,
          less(SAID, "purge", "rejection_finetuning")),
    Claim("Unlearn and reinvent (2604.05716): the model denies",
          "says it, the original minus reinvent", 0.5, INFINITE, less(SAID, "reinvent", ORIGINAL)),
)  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    runs = sorted(found["runs"], key=_title)
    parts = [
        "# On-policy methods on `world`\n",
        "A model is taught a made-up world and forgets some of its people; every method runs with "
        "its own defaults but for the rate and the most steps of the benchmark where it takes them "
        "(on `tiny` 2e-4 and 20), or with options that a search over its ranges found on the same "
        "rows, where a table says so. *Says it*: the share of forgotten answers that are said; *in "
        "other words* and *asked in reverse* are answers and questions that nobody trained on. "
        "*Refuses neighbours* is over-refusal. Behind ± is the half width of the 95 % "
        "interval over seeds. *Audit says* is the verdict of an audit of the depth in brackets, "
        "in the world of `delible bench battery`. Made by `performance/onpolicy_page.py`, whose "
        "head has the commands.\n",
    ]
    for run in runs:
        parts += section(run, {} if run["tune"] else found["audits"].get(run["model"], {}))
    numbers = {_title(run): [one.number(_entry(run)) for one in CLAIMS] for run in runs}
    parts += [
        "## What papers claim, and what shows here\n",
        *claims_table(CLAIMS, numbers),
    ]
    parts.append(
        "\nWhat comes of `reinvent` when facts are handed back, and of a forced beginning, is "
        "asked by `delible bench reinvent`: see [reinvention](../reinvention.md)."
    )
    return "\n".join(parts) + "\n"


def _entry(run: Mapping[str, Any]) -> Entry:
    return Entry([one for one in run["cells"] if not one.get("failed")], _seeds(run))


def _seeds(run: Mapping[str, Any]) -> int:
    return 1 + max(int(one["seed"]) for one in run["cells"])


def _title(run: Mapping[str, Any]) -> str:
    """A run of the page: its model, and whether its methods were tuned."""
    how = f"after a search of {run['tune']} trials" if run["tune"] else "defaults"
    return f"Model `{run['model']}`, {how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of 'delible bench world'")
    parser.add_argument("--audits", type=Path, nargs="*", default=[],
                        help="folders of 'delible bench battery'")  # fmt: skip
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {"runs": [], "audits": {}}
    for run in map(read, given.runs):
        found["runs"] = [*(one for one in found["runs"] if _title(one) != _title(run)), run]
    for folder in given.audits:
        model = read_json(folder / "experiment.json")["model"]
        found["audits"][model] = found["audits"].get(model, {}) | verdicts(folder)
    write(given.page, found, page(found))
    print(given.page)


if __name__ == "__main__":
    main()
