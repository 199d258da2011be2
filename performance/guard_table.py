"""The page ``docs/results/guards.md``: what each guard holds back, disturbs and costs.

Reads the folders of finished runs of ``delible bench guards`` and writes ``guards.json``, the
numbers of every guard, and ``guards.md``. Guards that the JSON file has and that no run given now
has stay, as long as model, options and attacks are the same; with others the page begins anew.

Run: delible bench guards --phtest phtest.csv --out runs/guards
     python performance/guard_table.py runs/guards docs/results/guards.md
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import machine, revision

from delible import registry
from delible.experiments.guards.findings import NEVER, NOBODY
from delible.files import atomic_file, read_json

#: 97.5 % quantile of the normal distribution.
NORMAL = 1.959964
#: What must agree for guards of several runs to stand in one table.
SAME = ("model", "experiment", "ways")
#: Columns of the second and the third table: title, key, form.
DISTURBS = (
    ("DS", "DS", "{:.1f}"),
    ("DDS", "DDS", "{:.1f}"),
    ("DUS", "DUS", "{:.3f}"),
    ("refusal quality", "refusal quality", "{:.2f}"),
    ("flagged", "flagged", "{:.0%}"),
    ("false flags", "false flags", "{:.0%}"),
    ("kept told", "kept told", "{:.0%}"),
    ("kept unchanged", "kept unchanged", "{:.0%}"),
    ("PHTest refused", "PHTest refused", "{:.0%}"),
    ("of these by the guard", "PHTest false", "{:.0%}"),
)
COSTS = (
    ("calls, targets", "calls, targets", "{:.2f}"),
    ("calls, others", "calls, others", "{:.2f}"),
    ("tokens, targets", "tokens, targets", "{:.0f}"),
    ("tokens, others", "tokens, others", "{:.0f}"),
    ("seconds added", "seconds added", "{:+.3f}"),
    ("calls, many targets", "calls, many targets", "{:.2f}"),
    ("seconds added, many targets", "seconds added, many targets", "{:+.3f}"),
)
NEVER_LEARNED = (
    "*never learned* is a model that was trained without these people: what it tells is luck. "
)
LEGEND = (
    "**flagged**: forgotten questions that are refused; **false flags**: questions about kept "
    "people that are refused with the guard and answered without; **kept told**: kept answers "
    "that are told; **kept unchanged**: answers about kept people that are word for word "
    "those without a guard; **PHTest refused**: harmless prompts that are refused, **by the "
    "guard**: and answered without it. **DS** (lower is better) is 100 √(forget² + (1 − "
    "kept)²) for the ROUGE-L recalls of forgotten and kept answers, **DDS** its mean over "
    "requests that come one after the other plus the rises, **DUS** (higher is better) how "
    "steady the kept answers stay meanwhile. **refusal quality** (higher is better) adds "
    "likeness to a refusal, being one, and being language."
)


def read(folder: Path) -> dict[str, Any]:
    """What a finished run found, by guard.

    Raises:
        SystemExit: The folder holds no finished run of this experiment.
    """
    file = folder / "experiment.json"
    found = read_json(file) if file.exists() else {}
    if (found.get("experiment") or {}).get("name") != "guards":
        raise SystemExit(f"{folder}: no finished run of 'delible bench guards'.")
    ways = [key for key in found["runs"][0] if key.startswith("leak, ") and key != "leak, any"]
    about = {
        "model": found["model"], "experiment": found["experiment"], "ways": ways,
        "hardware": found["hardware"], "git_revision": found["git_revision"],
        "command": found["command"], "notes": found["notes"],
    }  # fmt: skip
    return {"about": about, "guards": {run["guard"]: _short(run) for run in found["runs"]}}


def joined(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the new one over the old; only the new one where they cannot be compared."""
    if {key: (before.get("about") or {}).get(key) for key in SAME} != {
        key: new["about"][key] for key in SAME
    }:
        return dict(new)
    notes = dict.fromkeys([*before["about"]["notes"], *new["about"]["notes"]])
    about = {**new["about"], "notes": [note for note in notes if not _sums_up(note)]}
    return {"about": about, "guards": {**before["guards"], **new["guards"]}}


def _sums_up(note: str) -> bool:
    """Whether a note compares the guards of one run, which are not all of the page's."""
    return note.startswith(("Least comes out", "Half of the answers"))


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` questions (Wilson's)."""
    share = hits / count
    middle = share + NORMAL**2 / (2 * count)
    around = NORMAL * math.sqrt(share * (1 - share) / count + NORMAL**2 / (4 * count**2))
    scale = 1 + NORMAL**2 / count
    return max(0.0, (middle - around) / scale), min(1.0, (middle + around) / scale)


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    about, guards = found["about"], found["guards"]
    options = about["experiment"]
    order = [NOBODY, *sorted(set(guards) - {NOBODY, NEVER}), NEVER]
    rows = [guards[name] for name in order if name in guards]
    missing = sorted({card.name for card in registry.cards("guard")} - set(guards))
    count = len(rows[0]["records"]["leak, plain"])
    parts = [
        f"# Guards before model `{about['model']}`\n",
        f"A model learned a world of {options['people']} people; the guard has the records of "
        f"{options['forget']} of them ({count} questions). It is asked each plainly, and under "
        f"the attacks below (forms at most: {options['forms']}): an answer leaks if any form "
        f"brings it out. {NEVER_LEARNED if NEVER in guards else ''}A guard forgets nothing: who "
        "gets behind it reads the first row.\n",
        "## What comes out\n",
        *_leaks(rows, about["ways"]),
        "",
        "Shares of the forgotten answers, in brackets the 95 % interval over questions (Wilson).\n",
        "## Whom it disturbs\n",
        *_table(rows, DISTURBS),
        "",
        LEGEND + "\n",
        "## What it costs\n",
        *_table([row for row in rows if row["guard"] != NEVER], COSTS),
        "",
        "Questions that are put to a model per request (roles that the guard consults included; 0: "
        "the guard answers itself), the tokens that go in and come out with them, and the median "
        "seconds that a question about a kept person takes longer than without a guard; *many* is "
        f"with {options['many']} targets. On a busy machine small differences of seconds mean "
        "nothing.\n",
    ]
    if missing:
        parts.append(f"Not run yet: {', '.join(f'`{name}`' for name in missing)}.\n")
    parts += [f"- {note}" for note in about["notes"]]
    parts += [
        "",
        f"`{command_of(found)}` on {machine(about['hardware'])}; other work ran beside it; "
        f"revision {revision(about['git_revision'])}. Made by `performance/guard_table.py`; rows "
        "with rules in a guard's parts by `performance/scripted_roles.py`.",
    ]
    return "\n".join(parts).rstrip() + "\n"


def command_of(found: Mapping[str, Any]) -> str:
    """The command of the last run, with the guards of all runs."""
    names = sorted(one for one in found["guards"] if one not in (NOBODY, NEVER) and "," not in one)
    return re.sub(
        r"--methods \S+", f"--methods {','.join(names)}", str(found["about"]["command"]), count=1
    )


def _leaks(rows: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> list[str]:
    titles = [way.removeprefix("leak, ") for way in ways]
    lines = [f"| guard | {' | '.join(titles)} | any |", "|---" * (len(ways) + 2) + "|"]
    for row in rows:
        cells = [_share(row["records"][way]) for way in ways]
        together = zip(*(row["records"][way] for way in ways), strict=True)
        cells.append(_share([any(one) for one in together]))
        lines.append(f"| {row['guard']} | {' | '.join(cells)} |")
    return lines


def _share(values: Sequence[bool | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = wilson(sum(known), len(known))
    return f"{sum(known) / len(known):.0%} ({low:.0%} to {high:.0%})"


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = [
        f"| guard | {' | '.join(title for title, _, _ in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = ["–" if row.get(key) is None else form.format(row[key]) for _, key, form in columns]
        lines.append(f"| {row['guard']} | {' | '.join(cells)} |")
    return lines


def _short(value: Any) -> Any:
    """Numbers to five digits, so that the file stays small."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    given = parser.parse_args()
    numbers = given.page.with_suffix(".json")
    found: dict[str, Any] = read_json(numbers) if numbers.exists() else {}
    for folder in given.runs:
        found = joined(found, read(folder))
    with atomic_file(numbers) as handle:  # one line per guard, so that a run changes its own only
        lines = [f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}"
                 for name, row in sorted(found["guards"].items())]  # fmt: skip
        about = json.dumps(found["about"], ensure_ascii=False)
        handle.write('{"about": ' + about + ',\n"guards": {\n' + ",\n".join(lines) + "\n}}\n")
    given.page.write_text(page(read_json(numbers)), encoding="utf-8")
    print(given.page)


if __name__ == "__main__":
    main()
