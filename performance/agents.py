"""The page ``docs/results/agents.md``: agents that remember, share a task, and forget.

All agents are policies by rule or scripts, so the numbers are about the machinery (memory,
retrieval, mask, ledger of costs, adversary), and say nothing about how a language model obeys.

Writes ``NAME.json``, the numbers, after every seed of every part, and ``NAME.md``. What is there is
not run again, unless the sizes are others; ``--again`` does.

Run: python performance/agents.py docs/results/agents.md [--seeds 5]
     python performance/agents.py docs/results/agents.md --parts memento,cascade,forgetting,speed
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import agents_cascade
import agents_cases
import agents_forgetting
from agents_page import page

from delible.acting.conversion import Request
from delible.acting.loop import Budget, act
from delible.acting.town import Town, Visit, known
from delible.agents.secure_forgetting import SecureForgettingOptions
from delible.files import read_json, write_json
from delible.memory import Memory
from delible.rundir import git_revision, hardware, versions
from delible.system.role import Role
from delible.systems.scripted import Scripted

PARTS: Mapping[str, Any] = {
    "memento": agents_cases, "cascade": agents_cascade, "forgetting": agents_forgetting,
}  # fmt: skip
SPEED = "speed"
ROUNDS = 7
#: Steps of a task.
LENGTHS = (6, 40)


def speed(folder: Path) -> dict[str, Any]:
    """Milliseconds of CPU time that a step takes beside a model that answers at once."""
    town = Town.made(7, width=8, height=6, each=4)
    walk = json.dumps({"tool": "walk", "arguments": {"direction": "south"}})
    found: dict[str, Any] = {"steps": list(LENGTHS), "rounds": ROUNDS}
    for steps in LENGTHS:
        budget = Budget(steps=steps, tokens=steps * 64, step_tokens=64)
        role = Role("planner", Scripted(lambda _: walk))
        made = SecureForgettingOptions(budget=budget).agent(Memory(folder / f"{steps}"), role)
        made.memory.add(known(town.places, town.name))
        made.forget(Request(type="state", target=town.places[0].name))

        def alone(role: Role = role, budget: Budget = budget) -> object:
            visit = Visit(town)
            return act(role, "Go.", visit.tools(), budget, visit.opening())

        def whole(made: Any = made) -> object:
            return made.solve("Go to a bakery.", Visit(town), learn=False)

        found[f"loop {steps}"] = _milliseconds(alone, steps)
        found[f"agent {steps}"] = _milliseconds(whole, steps)
    return found


def _milliseconds(work: Callable[[], object], steps: int) -> float:
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start) / steps)
    return statistics.median(times)


def main(arguments: list[str] | None = None, sizes: Mapping[str, Any] | None = None) -> None:
    """Measures what is missing and writes the page.

    Args:
        sizes: Others than the parts' own, by part.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("--seeds", type=int, default=5, help="towns and worlds of each part")
    parser.add_argument("--parts", default=",".join([*PARTS, SPEED]), help="names, with commas")
    parser.add_argument("--again", action="store_true", help="run what is there, too")
    given = parser.parse_args(arguments)
    numbers = given.page.with_suffix(".json")
    found: dict[str, Any] = read_json(numbers) if numbers.exists() else {}

    def write() -> None:
        found.update(hardware=hardware(), versions=versions(), git=git_revision())
        write_json(numbers, found)
        given.page.write_text(page(found), encoding="utf-8")

    for name in (one for one in PARTS if one in given.parts.split(",")):
        module = PARTS[name]
        chosen = (sizes or {}).get(name, module.Sizes())
        part = found.get(name, {})
        if given.again or part.get("sizes") != asdict(chosen):
            part = {"sizes": asdict(chosen), "seeds": {}}
        for seed in map(str, range(given.seeds)):
            if seed in part["seeds"]:
                continue
            with tempfile.TemporaryDirectory() as home:
                part["seeds"][seed] = module.run(int(seed), Path(home), chosen)
            found[name] = part
            write()
            print(f"{name}, seed {seed}", flush=True)
    if SPEED in given.parts.split(",") and (given.again or SPEED not in found):
        with tempfile.TemporaryDirectory() as home:
            found[SPEED] = speed(Path(home))
    write()


if __name__ == "__main__":
    main()
