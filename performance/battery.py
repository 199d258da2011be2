"""The page ``docs/results/battery.md``: methods under the audit's battery of attacks.

Reads the folder of a finished ``delible bench battery`` and writes ``NAME.json``, the numbers of
every method and attack, and ``NAME.md``: the table, the verdicts, a map of methods by attacks, and
for each paper behind an attack whether its claim shows here.

A claim *shows* for a method where the attack's lowest e lies more than 0.05 below what the same
measures found when asked plainly; that it does not show says nothing about larger models.

Run: delible bench battery --depth deep --model default --out runs/battery
     python performance/battery.py runs/battery docs/results/battery.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import machine, revision, write

from delible.audit.weighing import SAME
from delible.errors import RunError
from delible.files import read_json

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the attacks that would show it.

    Attributes:
        chosen: Which rows of the matrix speak to it.
        number: A number of these rows instead of e, and what is read off it.
    """

    paper: str
    says: str
    chosen: Callable[[Run], bool]
    number: str | None = None


def _named(*names: str) -> Callable[[Run], bool]:
    return lambda run: run["attack"] in names and not run["control"]


CLAIMS = (
    Claim("2410.16454", "4-bit quantization brings hidden knowledge back",
          lambda run: run["attack"] == "quantize" and not run["control"]),
    Claim("2409.18025", "training on unrelated rows brings knowledge back",
          lambda run: run["attack"] == "relearn" and "unrelated" in run["variant"]),
    Claim("2410.08827", "training on other facts brings the held-out ones back", _named("rtt")),
    Claim("2605.24614", "hidden states hold what answers do not say", _named("patching", "lens")),
    Claim("2408.10682", "prompts that were searched for bring knowledge back",
          _named("dua", "gcg", "soft_prompt")),
    Claim("2603.11266", "questions over several facts reach what single ones do not",
          _named("multi_hop")),
    Claim("2506.17279", "step-by-step talks recover what a plain question does not",
          _named("sleek", "pair")),
    Claim("2509.24675", "emphasis on keywords brings knowledge back",
          _named("keyword_emphasis", "keyword_focus")),
    Claim("2407.00106", "knowledge handed back in the prompt is used again", _named("in_context")),
    Claim("2506.14003", "a model can be told to be unlearned by its answers",
          _named("trace_detection"), number="accuracy"),
)  # fmt: skip


def lowest(row: Mapping[str, float | None]) -> float | None:
    """The lowest e that there is."""
    return min((value for value in row.values() if value is not None), default=None)


def shown(claim: Claim, runs: Sequence[Run]) -> dict[str, tuple[float | None, float | None]]:
    """By method: e asked plainly, and the lowest e of the claim's attacks, by the same measures."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        plain = next(run["e"] for run in mine if run["attack"] == "none")
        rows = [run["e"] for run in mine if claim.chosen(run)]
        pairs = [
            (plain.get(measure), value)
            for row in rows
            for measure, value in row.items()
            if value is not None
        ]
        known = [(before, after) for before, after in pairs if before is not None]
        if known:
            before, after = max(known, key=lambda pair: pair[0] - pair[1])
            found[method] = (before, after)
        elif pairs:  # measured in another way than by asking
            found[method] = (lowest(plain), min(after for _, after in pairs))
        elif rows:
            found[method] = (None, None)
    return found


def sentence(claim: Claim, runs: Sequence[Run]) -> str:
    """One paragraph: for which methods a claim shows."""
    if claim.number is not None:
        return _numbers(claim, runs)
    found = shown(claim, runs)
    if not found:
        return "not run."
    said: dict[str, list[str]] = {"shows for": [], "does not show for": [], "has no power for": []}
    for method, (before, after) in found.items():
        if before is None or after is None:
            said["has no power for"].append(method)
            continue
        where = "shows for" if after < before - SAME else "does not show for"
        said[where].append(f"{method} ({before:.2f} → {after:.2f})")
    return "; ".join(f"{head} {', '.join(rows)}" for head, rows in said.items() if rows) + "."


def _numbers(claim: Claim, runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        if not claim.chosen(run):
            continue
        values = [
            f"{name.replace('_', ' ')} {value:.2f}"
            for name, by_system in run["numbers"].items()
            if claim.number in name and (value := by_system.get("unlearned")) is not None
        ]
        if values:
            title = f" ({run['variant']})" if run["variant"] else ""
            lines.append(f"{run['method']}{title}: {', '.join(values)}")
    return "; ".join(lines) + "." if lines else "not run."


def heat(runs: Sequence[Run]) -> list[str]:
    """Methods by attacks: the lowest e of each; – has no power."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    rows = list(dict.fromkeys((run["attack"], run["variant"]) for run in runs if run["weighs"]))
    lines = [f"| attack | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for attack, variant in rows:
        cells = []
        for method in methods:
            mine = [
                run for run in runs
                if (run["method"], run["attack"], run["variant"]) == (method, attack, variant)
            ]  # fmt: skip
            least = [run["erased"] for run in mine if run["erased"] is not None]
            cells.append(f"{min(least):.2f}" if least else "–")
        title = "asked plainly" if attack == "none" else attack
        lines.append(f"| {title}{f': {variant}' if variant else ''} | {' | '.join(cells)} |")
    return lines


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a run's ``experiment.json``."""
    rows, runs, world = found["rows"], found["runs"], found["experiment"]
    columns = list(rows[0])

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    parts = [
        f"# The battery: methods under attack, model `{found['model']}`\n",
        f"{world['people']} made-up people that a model was taught, {world['forget']} of whom are "
        f"to be forgotten; audits of depth *{world['depth']}*. Every number is the "
        "lowest e of its attacks: 0, all of the original's knowledge is there; 1, no more than in "
        "a model that never saw it. *Kept* is what is left of the worst part of the rest. "
        "*reference* is that retrained model, audited like the others.\n",
        f"Made by `{found['command']}` and `performance/battery.py`; {found['seconds'] / 60:.0f} "
        f"minutes on {machine(found['hardware'])}, other work beside it; revision "
        f"{revision(found['git_revision'])}.\n",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows),
        "\n## What would be tried first\n",
        *(f"- {note}" for note in found["notes"]),
        "\n## What papers claim, and what shows here\n",
        *(f"- **{claim.says}** (arXiv:{claim.paper}): {sentence(claim, runs)}" for claim in CLAIMS),
        "\n## Methods by attacks\n",
        *heat(runs),
    ]
    return "\n".join(parts) + "\n"


def _short(value: Any) -> Any:
    """Numbers to four digits, so that the file stays small."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of a finished 'delible bench battery'")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    given = parser.parse_args()
    path = given.run / "experiment.json"
    if not path.is_file():
        raise RunError("it holds no experiment.json; has the run ended?", where=str(given.run))
    found = read_json(path)
    found["runs"] = [_short(run) for run in found["runs"]]
    write(given.page, found, page(found))


if __name__ == "__main__":
    main()
