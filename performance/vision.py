"""What is left of a shape that a model forgot to see: `docs/results/vision.md`, by one command.

    python performance/vision.py runs/vision docs/results/vision.md [--model tiny-vlm] [--seeds 1]

Runs `delible bench vision` and writes its table and its findings. A killed run goes on where it
was: finished systems are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from delible.component import build
from delible.experiments.vision.exam import AROUND, CHANCE, FORGOTTEN, KEPT
from delible.lm.lm import LM
from delible.measure.benchmark import Findings, Setting

INTRO = """# A shape that is forgotten in pictures

Made by `python performance/vision.py FOLDER docs/results/vision.md` (`delible bench vision` as a \
page). A model that sees (`{model}`, {weights:,} weights) is asked about {pictures} \
pictures of {scenes} drawn scenes of which it never saw a picture. It forgets one shape of eight. \
What the words mean: [pictures](../vision.md).
"""


def table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    """Accuracies of all systems, in percent."""
    lines = [f"| system | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        values = ["–" if row[kind] is None else f"{100 * row[kind]:.1f} %" for kind in kinds]
        lines.append(f"| {row['system']} | {' | '.join(values)} |")
    return lines


def page(
    found: Findings, lm: LM, pictures: int, scenes: int, seconds: float, seeds: int,
    options: Mapping[str, Any],
) -> str:  # fmt: skip
    """The page."""
    chance = " · ".join(f"{kind} {100 * value:.1f} %" for kind, value in CHANCE.items())
    weights = sum(one.numel() for one in lm.model.parameters())
    parts = [
        INTRO.format(model=lm.name, weights=weights, pictures=pictures, scenes=scenes),
        "## The shape",
        *table(found.rows, FORGOTTEN),
        f"Low is forgotten. Chance: {chance} (a description names a shape by chance seldom; 0 is "
        "the floor).",
        "## What must stay",
        *table(found.rows, KEPT),
        "Other shapes; colour, place and size of all pictures, also of the forgotten shape.",
        "## Around it",
        *table(found.rows, AROUND),
        "*corners*: how many it has, of a picture of it; *corners of its name*: the same without a "
        "picture, which a change in the tower cannot touch.",
        "## Found",
        *(f"- {note}" for note in found.notes),
        f"\nOptions: {json.dumps(options) if options else 'those of the experiment'}; "
        f"seeds {seeds}, {seconds / 60:.0f} minutes (other work on the machine included, cached "
        f"parts not) on {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, transformers {transformers.__version__}.",
    ]  # fmt: skip
    lines = list[str]()
    for one in parts:
        joins = lines and lines[-1][:1] == one[:1] and one[:1] in ("|", "-")
        lines += [one] if joins else ["", one]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--model", default="tiny-vlm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--option", action="append", default=[], help="NAME=JSON of the experiment")
    given = parser.parse_args()
    began = time.perf_counter()
    options = {
        name: json.loads(value) for name, _, value in (o.partition("=") for o in given.option)
    }
    experiment = build("benchmark", {"name": "vision", **options})
    given.folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        given.model, given.method, given.seeds, given.folder,
        progress=lambda what, done, total: print(f"{done}/{total} {what}", flush=True),
    )  # fmt: skip
    found = experiment.run(setting)
    shown = experiment.asked()
    lm = LM.load(given.model)
    text = page(
        found, lm, len(shown), len({one.scene for one in shown}),
        time.perf_counter() - began, given.seeds, options,
    )  # fmt: skip
    given.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
