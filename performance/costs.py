"""What every method's optimiser step costs, relative to plain fine-tuning on as many tokens.

And what it does before its first step: attribution, masks, generated rows. Each method runs in a
process of its own, so that its peak memory is its own, and plain fine-tuning of all weights
follows in the same process, on as many rows as come nearest to the method's tokens: machines are
faster at one time than at another. Of a run's steps the shortest counts, without the first.

Run: python performance/training.py --costs [--model default] [--steps 3] [--rows 4]
     [--methods npo,rmu] [--markdown docs/performance.md]
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from common import FORGET, RETAIN, forget_peak, peak_gib, prepare, recipe

from delible import registry
from delible.context import Context
from delible.lm.lm import LM
from delible.records import QA
from delible.train.engine import Trainer
from delible.train.plan import Plan, make_plan
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.slots import Placement, SlotContext


def row_tokens(chosen: Recipe, plan: Plan, rows: Mapping[str, Sequence[Row]]) -> float:
    """Tokens of the rows of one step, each counted once, mean over steps."""
    total = 0
    for step in plan.steps:
        for forget, kept in step:
            total += sum(len(rows[role][forget].encoded.ids) for role in chosen.objective.roles)
            if kept is not None and chosen.keep.card.name != "none":
                total += len(rows["retain"][kept].encoded.ids)
    return total / len(plan.steps)


@dataclass
class Timed:
    """One short training: seconds of each step, tokens of a step, peak memory in weights.

    ``before``: the peak until there is an optimiser, so of masks, attribution and rows alone.
    """

    seconds: list[float]
    tokens: float
    before: float
    memory: float

    @property
    def step(self) -> float:
        return min(self.seconds[1:])


def timed(chosen: Recipe, model: str, records: Mapping[str, Sequence[QA]]) -> Timed:
    lm = LM.load(model)
    loaded = forget_peak()
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 2**30
    found = Timed([], 0.0, 0.0, 0.0)
    seen: list[Mapping[str, Sequence[Row]]] = []
    last = time.perf_counter()

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        found.seconds.append(time.perf_counter() - last)
        last = time.perf_counter()

    trainer = Trainer(
        lm, chosen, records, context=Context(steps=progress), start=lambda: LM.load(model)
    )
    make, optimizer = trainer.rows, trainer._optimizer

    def peak() -> float:
        return (peak_gib() - loaded + weights) / weights

    def rows_once() -> SlotContext:
        context = make()
        seen.append(context.rows)
        return context

    def optimizer_after(placement: Placement) -> torch.optim.Optimizer:
        found.before = peak()
        return optimizer(placement)

    trainer.rows = rows_once  # type: ignore[method-assign]
    trainer._optimizer = optimizer_after  # type: ignore[method-assign]
    last = time.perf_counter()
    trainer.train()
    plan = make_plan(chosen, seen[0]["forget"], seen[0]["retain"], 0)
    found.tokens = row_tokens(chosen, plan, seen[0])
    found.memory = peak()
    return found


def run_for_cost(method: str, model: str, steps: int, rows: int) -> None:
    """Prints the numbers of a method and of plain fine-tuning after it."""
    mine = timed(recipe(method, steps, rows), model, {"forget": FORGET, "retain": RETAIN})
    template, every = LM.load(model).template, [*FORGET, *RETAIN]
    sizes = [len(row.encoded.ids) for row in make_rows(template, every)]
    totals = list(itertools.accumulate(sizes))
    count = 1 + min(range(len(totals)), key=lambda place: abs(totals[place] - mine.tokens))
    plain = timed(
        recipe("finetune", steps, count), model, {"forget": every[:count], "retain": RETAIN}
    )
    print(json.dumps({
        "setup": max(0.0, mine.seconds[0] - mine.step), "step": mine.step, "tokens": mine.tokens,
        "before": mine.before, "memory": mine.memory, "plain": plain.step,
        "plain tokens": plain.tokens,
    }))  # fmt: skip


def costs(methods: Sequence[str], model: str, steps: int, rows: int) -> str:
    """The table of the methods' costs, relative to fine-tuning; no methods: all recipes."""
    every = [card.name for card in registry.cards("recipe") if card.name != "finetune"]
    found: dict[str, dict[str, float]] = {}
    for method in methods or every:
        command = [sys.executable, __file__, method, model, str(steps), str(rows)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            print(f"{method} failed: {answer.stderr.strip().splitlines()[-1]}")
            continue
        found[method] = json.loads(answer.stdout.strip().splitlines()[-1])
        print(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
    lines = [
        "| method | before the first step | its memory | a step | tokens | fine-tuning (tokens) "
        "| ratio | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {n['setup']:.1f} s | {n['before']:.1f}x | {n['step']:.2f} s | "
        f"{n['tokens']:.0f} | {n['plain']:.2f} s ({n['plain tokens']:.0f}) | "
        f"{n['step'] / n['plain']:.2f}x | {n['memory']:.1f}x |"
        for method, n in sorted(found.items(), key=lambda one: one[1]["step"] / one[1]["plain"])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    prepare(int(sys.argv[4]))
    run_for_cost(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
