"""What each option that needs less memory saves, and what it costs in time.

The same rows, losses and steps in a process of its own for each option: the peak of resident
memory above that before the model was made, and processor seconds of a step (the median, without
the first), as ratios to the run without options. On a CPU; what moves things off an accelerator
has nothing to do there.

Run: python performance/savings.py [--model default] [--rows 12] [--steps 4]
     [--markdown docs/performance.md]     (three minutes with the small random model)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from common import forget_peak, peak_gib, write_between
from dry import RETURNED, request, tiny_lm

from delible.context import Context
from delible.lm.lm import LM
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.method import records_of
from delible.train.recipe import Recipe

#: Slots and training settings by what the table says; the first is what the others are set beside.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all weights (`npo`)": ({}, {}),
    "`--gradient-checkpointing true`": ({}, {"gradient_checkpointing": True}),
    "`--optimizer adamw_8bit`": ({}, {"optimizer": "adamw_8bit"}),
    "`--optimizer sgd`": ({}, {"optimizer": "sgd"}),
    "`--place lora`": ({"place": "lora"}, {}),
    "`--place lora --gradient-checkpointing true`": (
        {"place": "lora"}, {"gradient_checkpointing": True},
    ),
    "`--place lora --base-precision bfloat16`": (
        {"place": "lora"}, {"base_precision": "bfloat16", "precision": "auto"},
    ),
    "`--place lora --base-precision int8`": (
        {"place": "lora"}, {"base_precision": "int8", "precision": "auto"},
    ),
}  # fmt: skip


def one(name: str, model: str, rows: int, steps: int) -> dict[str, float]:
    """Peak in GiB above what was there before the model, and seconds of a step."""
    slots, options = RUNS[name]
    length = {"epochs": steps, "max_steps": steps, "batch_size": rows, "least_steps": None,
              "stop_at_forget_share": None, "precision": "float32",
              "micro_batch_tokens": 100_000}  # fmt: skip
    given = {f"training.{key}": value for key, value in (length | options).items()}
    recipe = Recipe.named("npo").changed(slots, given)
    asked = request(rows)
    tiny = LM(tiny_model("llama"), tiny_tokenizer())  # what is loaded once is loaded before
    Trainer(tiny, recipe, records_of(asked)).train()
    before = psutil.Process().memory_info().rss / 2**30
    forget_peak()
    lm = tiny_lm(8) if model == "small" else LM.load(model)
    lm.hold(recipe.training.base_precision)
    forget_peak()  # not how it was loaded, but how it is trained
    ends = [time.process_time()]

    def told(*_: Any) -> None:
        ends.append(time.process_time())

    Trainer(lm, recipe, records_of(asked), context=Context(steps=told)).train()
    taken = [later - earlier for earlier, later in pairwise(ends[1:])]
    return {"peak": peak_gib() - before, "seconds": statistics.median(taken)}


def apart(*given: Any) -> dict[str, float]:
    """The same in a process of its own, with what is imported already."""
    with get_context("fork").Pool(1) as pool:  # nothing was computed before
        return pool.apply(one, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="small", help="small: random, 24 million weights")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if RETURNED.items() - os.environ.items():  # read by the allocator when a program begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RETURNED})
    lines = ["| option | peak memory | of it without | seconds a step | of them without |",
             "|---|---|---|---|---|"]  # fmt: skip
    first: dict[str, float] | None = None
    for name in RUNS:
        if ("8bit" in name or "int8" in name) and importlib.util.find_spec("torchao") is None:
            lines.append(f"| {name} | torchao is not installed | | | |")
            continue
        found = apart(name, given.model, given.rows, given.steps)
        first = first or found
        lines.append(
            f"| {name} | {found['peak']:.3f} GiB | {found['peak'] / first['peak']:.2f} | "
            f"{found['seconds']:.2f} | {found['seconds'] / first['seconds']:.2f} |"
        )
        print(lines[-1], flush=True)
    if given.markdown:
        name = "savings" if given.model == "small" else f"savings-{given.model}"
        write_between(given.markdown, name, "\n".join(lines))


if __name__ == "__main__":
    main()
