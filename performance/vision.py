"""What is left of a concept that a model forgot to see: `docs/results/vision.md`.

    python performance/vision.py runs/vision docs/results/vision.md [--seeds 1]
    python performance/vision.py runs/vision docs/results/vision.md --world emoji \\
        --model tiny-vlm-emoji

Runs `delible bench vision` and writes its tables and its findings between the marks of that world
in the page; the rest of the page stays. A killed run goes on where it was: finished systems are
kept in the folder.
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
from common import write_between

from delible.component import build
from delible.experiments.vision.exam import FORGOTTEN, around, chance, kept
from delible.experiments.vision.experiment import VisionForgetting
from delible.lm.lm import LM
from delible.measure.benchmark import Findings, Setting
from delible.world.picture_worlds import PICTURE_WORLDS
from delible.world.pictures import PictureWorld

INTRO = """A model that sees (`{model}`, {weights:,} weights) is asked about {pictures} pictures \
of {scenes} scenes of which it never saw a picture. It forgets one {noun} of {names}: {concept}."""


def table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    """Accuracies of all systems, in percent."""
    lines = [f"| system | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        values = ["–" if row[kind] is None else f"{100 * row[kind]:.1f} %" for kind in kinds]
        lines.append(f"| {row['system']} | {' | '.join(values)} |")
    return lines


def part(
    found: Findings, experiment: VisionForgetting, lm: LM, seconds: float, seeds: int,
    options: Mapping[str, Any],
) -> str:  # fmt: skip
    """The part of the page about one world of pictures."""
    world, shown = experiment.scenery, experiment.asked()
    noun, *others = world.aspects
    blind = " · ".join(f"{kind} {100 * value:.1f} %" for kind, value in chance(world).items())
    trait, trait_of_its_name = around(world)
    parts = [
        INTRO.format(
            model=lm.name, weights=sum(one.numel() for one in lm.model.parameters()),
            pictures=len(shown), scenes=len({one.scene for one in shown}), noun=noun,
            names=len(world.names), concept=experiment.both[0],
        ),
        f"### The {noun}",
        *table(found.rows, FORGOTTEN),
        f"Low is forgotten. Chance: {blind} (a description says a name by chance seldom; 0 is "
        "the floor).",
        "### What must stay",
        *table(found.rows, kept(world)),
        said_of_neighbours(world, experiment.both[0])
        + f" *{', '.join(others)}*: of all pictures, also of the forgotten {noun}.",
        "### Around it",
        *table(found.rows, around(world)),
        f"*{trait}*: asked of a picture of it; *{trait_of_its_name}*: the same without a "
        "picture, which a change in the tower cannot touch.",
        "### Found",
        *(f"- {note}" for note in found.notes),
        f"Options: {json.dumps(options) if options else 'those of the experiment'}; "
        f"seeds {seeds}, {seconds / 60:.0f} minutes (other work on the machine included, cached "
        f"parts not) on {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, transformers {transformers.__version__}.",
    ]  # fmt: skip
    lines = list[str]()
    for one in parts:
        joins = lines and lines[-1][:1] == one[:1] and one[:1] in ("|", "-")
        lines += [one] if joins else ["", one]
    return "\n".join(lines).strip()


def said_of_neighbours(world: PictureWorld, concept: str) -> str:
    """Which names stand for what must stay."""
    near = world.neighbours(concept)
    if len(near) + 1 == len(world.names):
        return f"*neighbours*: the other {world.noun}s;"
    return f"*neighbours*: {', '.join(near)}; *others*: the other {world.noun}s;"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--world", default="shapes", choices=list(PICTURE_WORLDS))
    parser.add_argument("--model", default="tiny-vlm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--option", action="append", default=[], help="NAME=JSON of the experiment")
    given = parser.parse_args()
    began = time.perf_counter()
    options = {
        name: json.loads(value) for name, _, value in (o.partition("=") for o in given.option)
    }
    experiment = build("benchmark", {"name": "vision", "world": given.world, **options})
    given.folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        given.model, given.method, given.seeds, given.folder,
        progress=lambda what, done, total: print(f"{done}/{total} {what}", flush=True),
    )  # fmt: skip
    found = experiment.run(setting)
    seconds = time.perf_counter() - began
    text = part(found, experiment, LM.load(given.model), seconds, given.seeds, options)
    write_between(given.page, given.world, text)


if __name__ == "__main__":
    main()
