"""What every method's optimiser step costs, relative to plain fine-tuning on as many tokens.

And what it does before its first step: attribution, masks, generated rows. Each method runs in a
process of its own, so that its peak memory is its own.

Run: python benchmarks/training.py --costs [--model default] [--steps 3] [--rows 4]
     [--methods npo,rmu] [--markdown docs/performance.md]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from common import FORGET, RETAIN, forget_peak, peak_gib, prepare, recipe

from delible import registry
from delible.lm.lm import LM
from delible.train.engine import Plan, Trainer, make_plan
from delible.train.recipe import Recipe
from delible.train.slots import Context
from delible.train.step import Row


def row_tokens(chosen: Recipe, plan: Plan, rows: Mapping[str, Sequence[Row]]) -> float:
    """Tokens of the rows of one step, each counted once, mean over steps."""
    total = 0
    for step in plan.steps:
        for forget, kept in step:
            total += sum(len(rows[role][forget].encoded.ids) for role in chosen.objective.roles)
            if kept is not None and chosen.keep.card.name != "none":
                total += len(rows["retain"][kept].encoded.ids)
    return total / len(plan.steps)


def run_for_cost(method: str, model: str, steps: int, rows: int) -> None:
    """Prints seconds before the first step, of a later step, its tokens, and memory in GiB."""
    lm = LM.load(model)
    loaded = forget_peak()
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 2**30
    plain = method == "finetune"  # trains on the retain rows as well, so on as many tokens
    chosen = recipe(method, steps, 2 * rows if plain else rows)
    forget = [*FORGET, *RETAIN[:rows]] if plain else FORGET
    times: list[float] = []
    seen: list[Mapping[str, Sequence[Row]]] = []
    last = time.perf_counter()

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    trainer = Trainer(
        lm, chosen, {"forget": forget, "retain": RETAIN}, progress=progress,
        start=lambda: LM.load(model),
    )  # fmt: skip
    make = trainer.rows

    def rows_once() -> Context:
        context = make()
        seen.append(context.rows)
        return context

    trainer.rows = rows_once  # type: ignore[method-assign]
    trainer.train()
    plan = make_plan(chosen, seen[0]["forget"], seen[0]["retain"], 0)
    step = sorted(times[1:])[len(times[1:]) // 2]
    tokens = row_tokens(chosen, plan, seen[0])
    print(json.dumps({
        "setup": times[0] - step, "step": step, "tokens": tokens,
        "memory": (peak_gib() - loaded + weights) / weights,
    }))  # fmt: skip


def costs(
    methods: Sequence[str], model: str, steps: int, rows: int, say: Callable[[str], None]
) -> str:
    """The table of the methods' costs, relative to fine-tuning; no methods: all recipes."""
    every = [card.name for card in registry.cards("recipe") if card.name != "finetune"]
    found: dict[str, dict[str, float]] = {}
    for method in ("finetune", *(methods or every)):
        command = [sys.executable, __file__, method, model, str(steps), str(rows)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            say(f"{method} failed: {answer.stderr.strip().splitlines()[-1]}")
            continue
        found[method] = json.loads(answer.stdout.strip().splitlines()[-1])
        say(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
    each = found["finetune"]["step"] / found["finetune"]["tokens"]
    lines = [
        "| method | before the first step | a step | relative to fine-tuning | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {n['setup']:.1f} s | {n['step']:.2f} s | "
        f"{n['step'] / n['tokens'] / each:.2f}x | {n['memory']:.1f}x |"
        for method, n in sorted(found.items(), key=lambda one: one[1]["step"] / one[1]["tokens"])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    prepare(int(sys.argv[4]))
    run_for_cost(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
