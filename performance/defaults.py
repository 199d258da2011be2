"""The page ``docs/results/defaults.md``: what every method does with no option given.

A model is taught the world of ``delible demo`` (ten people; the same cached target and reference),
and every recipe, editor, intervention and procedure then forgets two of them with its own
defaults. Reached is the share of the way from the target's to the reference's answer probability on
the forget rows; kept is what is left of the answer probability of retained and neighbouring rows. A
default is sensible when it reaches half of the way and keeps nine tenths of both; a method that
does not must say on its card what to set.

Writes ``NAME.json``, the numbers, after every method, and ``NAME.md``. A method whose recipe has
not changed since its row was measured is not run again; ``--again`` does. Two kinds of processors
teach two models that differ in the last digits: every row is compared with the model that it began
with. Several processes each write a page of their own; ``--merge`` puts their rows into one.

Run: python performance/defaults.py docs/results/defaults.md
     python performance/defaults.py docs/results/defaults.md --methods npo,rmu --strengths all
     python performance/defaults.py docs/results/defaults.md --merge first.json second.json
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import machine, revision, write

from delible import registry
from delible.api import unlearn
from delible.demo import learn, request_of, world_of
from delible.errors import DelibleError, RunError
from delible.files import read_json
from delible.kept import identity
from delible.lm.lm import LM
from delible.records import ForgetRequest
from delible.resolving import resolve_method
from delible.rundir import git_revision, hardware, versions
from delible.train.monitor import answer_probability
from delible.watching import shown

#: A sensible default goes at least this share of the way, and keeps at least this share.
WAY, KEPT = 0.5, 0.9
#: Fine-tuning teaches; it is no method of forgetting.
TEACHING = ("finetune",)
SPLITS = ("forget", "retain", "neighbours")
STRENGTHS = ("gentle", "normal", "strong")

Probabilities = Mapping[str, float]


def methods() -> dict[str, str]:
    """Every method that forgets texts, and its kind."""
    cards = registry.cards("recipe", "editor", "intervention", "procedure")
    return {
        card.name: card.kind
        for card in cards
        if card.name not in TEACHING and "pictures" not in card.needs
    }


def way(before: Probabilities, after: Probabilities, never: Probabilities) -> float:
    """Share of the way from the target to the reference; over 1: further than the reference."""
    return (before["forget"] - after["forget"]) / (before["forget"] - never["forget"])


def kept(before: Probabilities, after: Probabilities, split: str) -> float:
    """Share of a split's answer probability that is left."""
    return after[split] / before[split]


def sensible(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a row reaches half of the way and keeps nine tenths."""
    if row.get("failed"):
        return False
    before, never = _ends(row, found)
    after = row["after"]
    shares = [kept(before, after, split) for split in SPLITS[1:]]
    return way(before, after, never) >= WAY and min(shares) >= KEPT


def verdict(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What the row shows, in words; what the card advises where it falls short."""
    if sensible(row, found):
        return "ok"
    told = registry.card(row["kind"], row["method"]).advice
    if row.get("failed"):
        return f"refused: {row['failed']}{f' Card: {told}' if told else ''}"
    return f"card: {told}" if told else "**falls short**"


def measured(lm: LM, request: ForgetRequest) -> dict[str, float]:
    """Mean answer probability by split, to six digits."""
    return {
        split: float(f"{answer_probability(lm, getattr(request, split)):.6g}") for split in SPLITS
    }


def run(method: str, start: LM, request: ForgetRequest, strength: Any) -> dict[str, Any]:
    """What the method does with its defaults to a copy of the taught model."""
    lm, began = start.copy(), time.perf_counter()
    try:
        result = unlearn(lm, request, method=method, strength=strength, shown=0, measured=False)
    except DelibleError as error:
        return {"failed": str(error).replace(start.name, "the taught model")}
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": result.notes.get("steps", 0),
        "stopped": result.stopped,
        "after": measured(result.model, request),
    }


def _ends(row: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Probabilities, Probabilities]:
    """The model that a row began with, and the one that never saw the forget rows."""
    taught = found["taught"][row["taught"]]
    return taught["before"], taught["reference"]


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of a JSON file's content."""
    rows = sorted(found["rows"], key=lambda row: (row["method"], STRENGTHS.index(row["strength"])))
    plain = [row for row in rows if row["strength"] == "normal"]
    good = sum(sensible(row, found) for row in plain)
    declined = sum("failed" in row for row in plain)
    refused = f", {declined} refuse this model and say why" if declined else ""
    parts = [
        f"# Every method with its defaults, model `{found['model']}`\n",
        f"The world of `delible demo`: ten people, {found['counts']['forget']} facts about two of "
        "them to forget. Each method runs with no option at all. *Way* is how far the answer "
        "probability of the forget rows went from the taught model's to the reference's, which "
        "never saw them (over 100 %: below a model that never knew); *kept* is the share of the "
        f"probability of retained and of neighbouring answers that is left. A row is ok at "
        f"{WAY:.0%} of the way with {KEPT:.0%} kept; what falls short says on its card what to "
        "set.\n",
        f"{good} of {len(plain)} methods are ok{refused}. Made by `performance/defaults.py`, whose "
        "head has the command.\n",
        *(_taught(key, one, plain) for key, one in found["taught"].items()),
        "",
        "| method | way | retain kept | neighbours kept | forget before → after "
        "| retain before → after | steps | seconds | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    parts += [_line(row, found) for row in plain]
    missing = sorted(set(methods()) - {row["method"] for row in plain})
    if missing:
        parts.append(f"\nNot run yet on this model: {', '.join(missing)}.")
    others = {row["method"] for row in rows if row["strength"] != "normal"}
    if others:
        parts += [
            "",
            "## One dial: `--strength`\n",
            "| method | gentle: way | normal | strong | gentle: least kept | normal | strong |",
            "|---|---|---|---|---|---|---|",
        ]
        parts += [_dial(method, rows, found) for method in sorted(others)]
    return "\n".join(parts) + "\n"


def _taught(key: str, taught: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a taught model and its reference say, on which machine, and how many rows began so."""
    before, never = taught["before"], taught["reference"]
    mine = sum(row["taught"] == key for row in rows)
    return (
        f"- {mine} methods began with the model `{key}`. It gives {before['forget']:.3f} to the "
        f"forget rows, {before['retain']:.3f} to the retained ones and "
        f"{before['neighbours']:.3f} to neighbours; its reference {never['forget']:.3f}, "
        f"{never['retain']:.3f} and {never['neighbours']:.3f}. Machine: "
        f"{machine(taught['hardware'])}; other work ran beside it, so *seconds* are an upper "
        f"bound. Code of the last row: {revision(taught['git'])}."
    )


def _line(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if row.get("failed"):
        return f"| {row['method']} | | | | | | | | {verdict(row, found)} |"
    (before, never), after = _ends(row, found), row["after"]
    cells = [
        row["method"],
        f"{way(before, after, never):.0%}",
        *(f"{kept(before, after, split):.0%}" for split in ("retain", "neighbours")),
        *(f"{before[split]:.3f} → {after[split]:.3f}" for split in ("forget", "retain")),
        str(row["steps"] or "–"),
        f"{row['seconds']:.0f}",
        verdict(row, found),
    ]
    return f"| {' | '.join(cells)} |"


def _dial(method: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    by = {row["strength"]: row for row in rows if row["method"] == method and "after" in row}
    ways, least = [], []
    for strength in STRENGTHS:
        if strength not in by:
            ways.append("–")
            least.append("–")
            continue
        (before, never), after = _ends(by[strength], found), by[strength]["after"]
        ways.append(f"{way(before, after, never):.0%}")
        least.append(f"{min(kept(before, after, split) for split in SPLITS[1:]):.0%}")
    return f"| {' | '.join([method, *ways, *least])} |"


def merge(page_file: Path, others: Sequence[Path]) -> None:
    """Takes rows of other files into a page; all must be of one model, taught the same.

    Raises:
        RunError: They are not.
    """
    numbers = page_file.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else read_json(others[0])
    alike = ("model", "target", "counts")
    for other in map(read_json, others):
        here, there = ({key: one[key] for key in alike} for one in (found, other))
        if here != there:
            raise RunError(f"the rows are of different runs: {here} and {there}.")
        taken = {(row["method"], row["strength"]) for row in other["rows"]}
        left = [row for row in found["rows"] if (row["method"], row["strength"]) not in taken]
        found |= {"taught": found["taught"] | other["taught"], "rows": [*left, *other["rows"]]}
    _write(page_file, found)


def _write(page_file: Path, found: dict[str, Any]) -> None:
    began = {row["taught"] for row in found["rows"]}
    found["taught"] = {key: one for key, one in found["taught"].items() if key in began}
    write(page_file, found, page(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("--methods", help="names separated by commas; all without it")
    parser.add_argument("--model", default="default", help="what learns the world")
    parser.add_argument("--strengths", choices=("normal", "all"), default="normal")
    parser.add_argument("--again", action="store_true", help="run rows that are there, too")
    parser.add_argument("--merge", type=Path, nargs="+", help="JSON files whose rows are taken")
    given = parser.parse_args()
    if given.merge:
        merge(given.page, given.merge)
        return
    kinds = methods()
    chosen_methods = given.methods.split(",") if given.methods else list(kinds)
    split = world_of()
    request = request_of(split)
    with shown(print):
        target = learn(given.model, split.records("known"), 0, "target")
        reference = learn(given.model, split.records("kept"), 0, "reference")
    start = LM.load(str(target))
    counts = {split: len(getattr(request, split)) for split in SPLITS}
    described = {"model": given.model, "target": target.parent.name, "counts": counts}
    numbers = given.page.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {}
    if {key: found.get(key) for key in described} != described:
        found = {**described, "taught": {}, "rows": []}
    here = hardware()
    on = {key: here[key] for key in ("accelerator", "precision")}
    key = identity({"weights": start.identity, **on})[:8]
    if key not in found["taught"]:
        before, never = measured(start, request), measured(LM.load(str(reference)), request)
        found["taught"][key] = {"weights": start.identity, "before": before, "reference": never}
    strengths = STRENGTHS if given.strengths == "all" else ("normal",)
    for method in chosen_methods:
        for strength in strengths if kinds[method] == "recipe" else ("normal",):
            chosen = strength if kinds[method] == "recipe" else None
            spec = identity(resolve_method(method, strength=chosen).spec())
            mine = [
                one for one in found["rows"]
                if (one["method"], one["strength"]) == (method, strength)
            ]  # fmt: skip
            if mine and mine[0]["spec"] == spec and not given.again:
                continue
            row = {
                "method": method, "kind": kinds[method], "strength": strength, "spec": spec,
                "taught": key, **run(method, start, request, chosen),
            }  # fmt: skip
            gc.collect()  # a trained model refers to itself
            found["rows"] = [*(one for one in found["rows"] if one not in mine), row]
            found["taught"][key] |= {
                "hardware": here, "versions": versions(), "git": git_revision(),
            }  # fmt: skip
            _write(given.page, found)
            print(_line(row, found), flush=True)


if __name__ == "__main__":
    main()
