"""The page ``docs/results/experiments.md``: what papers claim, and what shows at this scale.

Reads the folders of finished runs and writes two files: ``experiments.json``, the numbers of
every run, and ``experiments.md``. Runs that the JSON file has and that are not named now stay,
so the page is built up over days. A run is made by one command, ``delible bench NAME …`` for an
experiment or ``performance/probes.py`` for RWKU and ORT on made-up people; the page tells them.

The claims, and the rule that says whether they show, are in ``claims.py``.

Run: delible bench path --model tiny --seeds 3 --out runs/path-tiny
     python performance/experiments.py runs/path-tiny docs/results/experiments.md
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from claims import CLAIMS, COMMANDS, DESCRIBED, QUESTIONS, WANTED
from evidence import Entry, verdict
from pages import claims_table, machine, revision

from delible import registry
from delible.bench.table import ORIGINAL, REFERENCE, Number
from delible.component import build
from delible.files import atomic_file, read_json
from delible.measure.benchmark import Benchmark
from delible.report.origin import flags
from delible.rundir import git_revision

#: What the cells of a leaderboard are reduced to: values of records, by metric and split.
KEPT = {"rwku": ("rwku_recall",), "ort": ("form_probability",)}
#: What one run of the page is: everything but the numbers.
ABOUT = (
    "command", "model", "methods", "seeds", "seconds", "notes", "git_revision", "versions",
    "hardware",
)  # fmt: skip


# ---- reading runs


def read(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name and the content of a run's entry.

    Raises:
        SystemExit: The folder holds no finished run.
    """
    if (folder / "experiment.json").exists():
        found = read_json(folder / "experiment.json")
        runs = [dict(run) for run in found["runs"]]
        about = {key: found.get(key) for key in ABOUT}
        named = found["experiment"]
    elif (folder / "bench.json").exists():
        found = read_json(folder / "bench.json")
        cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
        named = found["benchmark"]
        runs = [_run_of(cell, KEPT[named["name"]]) for cell in cells]
        asked = folder / "command.json"
        seeds = 1 + max(int(cell["seed"]) for cell in cells)
        methods = list(dict.fromkeys(cell["method"] for cell in cells))
        about = {key: found.get(key) for key in ABOUT} | {
            "command": _command(found, methods, seeds),
            "methods": methods,
            "seeds": seeds,
            "seconds": round(sum(float(cell.get("seconds") or 0.0) for cell in cells), 1),
            "git_revision": git_revision(),
            **(read_json(asked) if asked.exists() else {}),
        }
    else:
        raise SystemExit(f"{folder}: no experiment.json and no bench.json; has the run ended?")
    about["options"] = {key: value for key, value in named.items() if key != "name"}
    about["model"] = about["model"] if about["model"] in ("tiny", "default") else "taught"
    return f"{named['name']} {about['model']}", {"about": about, "runs": [_short(r) for r in runs]}


def _command(found: Mapping[str, Any], methods: Sequence[str], seeds: int) -> str:
    benchmark = cast(Benchmark, build("benchmark", found["benchmark"]))
    named = [method for method in methods if method not in (ORIGINAL, REFERENCE)]
    words = [
        "delible", "bench", benchmark.card.name, "--methods", ",".join(named) or "none",
        "--model", found["model"], *flags(benchmark), "--seeds", str(seeds),
    ]  # fmt: skip
    # where the files were is of no use to others
    return shlex.join(words) + (" --data FOLDER" if found.get("data") else "")


def _run_of(cell: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        split: [item[0] for item in items]
        for metric in metrics
        for split, items in cell.get("values", {}).get("items", {}).get(metric, {}).items()
    }
    failed = {"failed": cell["failed"]} if "failed" in cell else {}
    return {key: cell[key] for key in ("task", "method", "seed")} | failed | values


def _short(value: Any) -> Any:
    """Numbers to five digits, so that the file stays small."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """One line per run, so that a later run changes its own lines only."""
    parts = []
    for name, entry in sorted(entries.items()):
        about = json.dumps(entry["about"], ensure_ascii=False)
        runs = ",\n".join(json.dumps(run, ensure_ascii=False) for run in entry["runs"])
        parts.append(f'{json.dumps(name)}: {{"about": {about}, "runs": [\n{runs}\n]}}')
    with atomic_file(path) as handle:
        handle.write("{\n" + ",\n".join(parts) + "\n}\n")


# ---- the page


def page(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown page of a JSON file's content."""
    found = {
        key: [claim.number(_entry(entry)) for claim in CLAIMS[key.split()[0]]]
        for key, entry in entries.items()
    }
    parts = [
        "# Experiments: what papers claim, and what shows at this scale\n",
        "Every table has the paper's claim, a number that would be in the stated range if it held, "
        "and whether it does. *Shows* is said when the whole 95 % interval lies in the range, "
        "*does not show* when all of it lies outside, *cannot be told* otherwise, and for a "
        "number without an interval, which is that of one run or of seeds that all gave the same. "
        "The interval covers two: over seeds (Student's), and "
        "over records (bootstrap of the mean over seeds, where records have values); for areas and "
        "shares of runs it is Newcombe's. `tiny` has 1.4 million weights and `default` 135 "
        "million, so that something does not show here says nothing about large models. Made by "
        "`performance/experiments.py` from `experiments.json`; the claims are in "
        "`performance/claims.py`.\n",
        *_summary(found),
    ]
    for name, described in DESCRIBED.items():
        mine = {key: entry for key, entry in entries.items() if key.split()[0] == name}
        card = next(card for card in registry.cards("benchmark") if card.name == name)
        parts += [f"## `{name}`: {card.title}\n", f"{described} (arXiv:{card.paper})\n"]
        if mine:
            models = {key.split()[1]: found[key] for key in sorted(mine, reverse=True)}
            parts += [*claims_table(CLAIMS[name], models), ""]
        for model, seeds in WANTED.items():
            key = f"{name} {model}"
            if key in mine:
                parts += _about(key, mine[key]["about"])
            else:
                command = COMMANDS[name].format(model=model, seeds=seeds)
                parts.append(f"**{model}**: not run yet; `{command}`.\n")
    return "\n".join(parts).rstrip() + "\n"


def _summary(found: Mapping[str, Sequence[Number]]) -> list[str]:
    lines = [
        "| question | experiment | model | claims that show | that do not | that cannot be told |",
        "|---|---|---|---|---|---|",
    ]
    for name, question in QUESTIONS.items():
        for key, numbers in sorted(found.items(), reverse=True):
            if key.split()[0] != name:
                continue
            said = [verdict(*pair) for pair in zip(CLAIMS[name], numbers, strict=True)]
            counts = [sum(one.strip("*").startswith(word) for one in said)
                      for word in ("shows", "does not", "cannot")]  # fmt: skip
            cells = [question, f"`{name}`", key.split()[1], *map(str, counts)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _entry(entry: Mapping[str, Any]) -> Entry:
    return Entry(entry["runs"], int(entry["about"]["seeds"] or 1))


def _about(key: str, about: Mapping[str, Any]) -> list[str]:
    minutes = (about["seconds"] or 0) / 60
    seeds = about["seeds"] or 1
    return [
        f"**{key.split()[1]}**: `{about['command']}`; {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{minutes:.0f} minutes (other work on the machine included) on "
        f"{machine(about['hardware'])}, revision {revision(about['git_revision'])}, torch "
        f"{about['versions'].get('torch', '?')}.\n",
        *(f"- {note}" for note in about.get("notes") or ()),
        *([""] if about.get("notes") else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    entries: dict[str, dict[str, Any]] = read_json(numbers) if numbers.exists() else {}
    entries |= dict(read(folder) for folder in given.runs)
    write(numbers, entries)
    given.page.write_text(page(read_json(numbers)), encoding="utf-8")
    print(given.page)


if __name__ == "__main__":
    main()
