"""What a dry run says of memory, beside what the same run takes: small random models on a CPU.

Each run is a process of its own: a model is made, the estimate is taken, two steps are trained,
and the peak of resident memory above that before the model was made is compared. Then the table of
large models, which is arithmetic alone: no weight of them is ever in memory.

Run: python performance/dry.py [--markdown docs/scale.md]     (two minutes)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from common import forget_peak, peak_gib, write_between
from transformers import LlamaConfig

from delible.context import Context
from delible.lm.lm import LM
from delible.planning import plan_of
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.method import records_of
from delible.train.recipe import Recipe
from delible.train.savings import ways_of

#: Method, slots and options of the runs that are measured, and the rows of a step.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "all weights": ("npo", {}, {"precision": "float32"}, 6),
    "all weights, exact reference": ("npo_kl", {}, {"precision": "float32"}, 6),
    "all weights, bf16 computation": ("npo", {}, {"precision": "bfloat16"}, 6),
    "adapters": ("npo_lora", {"finish": "none"}, {"precision": "float32"}, 6),
    "adapters on bf16 weights": (
        "npo_lora", {"finish": "none"}, {"base_precision": "bfloat16"}, 6,
    ),
    "hidden states": ("rmu", {}, {"precision": "float32"}, 6),
    "all weights, blocks computed again": (
        "npo", {}, {"precision": "float32", "gradient_checkpointing": True}, 6,
    ),
}  # fmt: skip
AGAIN = "--gradient-checkpointing true"
#: Ways of the table of large models, as they are said, from what changes least.
WAYS = (
    "", AGAIN, f"{AGAIN} --optimizer adamw_8bit", "--place lora --base-precision bfloat16",
    *(f"--place lora --base-precision {held} {AGAIN}" for held in ("bfloat16", "int8", "int4")),
)  # fmt: skip
GIB = 2**30
#: Freed tensors go back to the system at once: what is measured is not what malloc holds back.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Size:
    """A model of the Llama family by its numbers."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary, tie_word_embeddings=self.tied,
            max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
        )  # fmt: skip


LARGE = {
    "1B": Size(2048, 8192, 16, 32, 8, 128256, True),
    "3B": Size(3072, 8192, 28, 24, 8, 128256, True),
    "8B": Size(4096, 14336, 32, 32, 8, 128256, False),
    "14B": Size(5120, 17408, 40, 40, 8, 151936, False),
    "70B": Size(8192, 28672, 80, 64, 8, 128256, False),
}


def request(rows: int) -> ForgetRequest:
    """Questions of some length."""
    made = tuple(
        QA(question=f"In which town, and in which year, was the person with number {n} born?",
           answer=f"In a small town by the sea, in the year {1900 + n % 90}.")
        for n in range(rows)
    )  # fmt: skip
    return ForgetRequest(forget=made, retain=tuple(reversed(made)))


def chosen(name: str) -> Recipe:
    method, slots, options, rows = RUNS[name]
    length = {"epochs": 2, "max_steps": 2, "batch_size": rows, "micro_batch_tokens": 100_000}
    given = {f"training.{key}": value for key, value in (length | options).items()}
    return Recipe.named(method).changed(slots, given)


def one(name: str) -> dict[str, float]:
    """The estimate of a run and its measured peak, in GiB above what was there before."""
    recipe = chosen(name)
    asked = request(RUNS[name][3])
    tiny = LM(tiny_model("llama"), tiny_tokenizer())  # what is loaded once is loaded before
    Trainer(tiny, recipe.changed({}, {}), records_of(asked)).train()
    plan_of(tiny_lm(2), asked, method=recipe)
    before = psutil.Process().memory_info().rss / GIB
    lm = tiny_lm(4)
    lm.hold(recipe.training.base_precision)
    estimate = plan_of_same(lm, asked, recipe)
    forget_peak()
    Trainer(lm, recipe, records_of(asked), context=Context()).train()
    return {"estimate": estimate, "measured": peak_gib() - before, "before": before}


def tiny_lm(layers: int) -> LM:
    """A random model: 3 million weights a block, the tokens are bytes."""
    model = tiny_model(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    return LM(model, tiny_tokenizer(), name="random")


def plan_of_same(lm: LM, asked: ForgetRequest, recipe: Recipe) -> float:
    """The estimate from the settings alone, as a dry run makes it."""
    with tempfile.TemporaryDirectory() as folder:
        lm.core.config.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        _, cost = plan_of(folder, asked, method=recipe)
    assert cost is not None
    return cost.memory_gib


def measured() -> str:
    """The Markdown of the runs."""
    lines = ["| run | dry run | measured | dry run / measured |", "|---|---|---|---|"]
    for name in RUNS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True,
            env={**os.environ, **RETURNED},
        )  # fmt: skip
        told = json.loads(done.stdout.splitlines()[-1])
        ratio = told["estimate"] / told["measured"]
        lines.append(
            f"| {name} (`{RUNS[name][0]}`) | {told['estimate']:.3f} GiB | "
            f"{told['measured']:.3f} GiB | {ratio:.2f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def large() -> str:
    """The Markdown of models that are too large to be run here."""
    lines = [
        "| model | parameters | all weights (`npo`) | … computed again | … moments in 8 bits | "
        "adapters on bf16 | … computed again | … on 8 bits | … on 4 bits | fits 24 GiB | "
        "fits 80 GiB |",
        f"|{'---|' * 11}",
    ]
    asked = request(16)
    for name, size in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            size.config().save_pretrained(folder)
            peaks = {words: peak_of(folder, asked, words) for words in WAYS}
        columns = [f"{peak / GIB:,.1f} GiB" for peak in peaks.values()]
        cells = [*columns, first(peaks, 24 * GIB), first(peaks, 80 * GIB)]
        lines.append(f"| {name} | {parameters(size) / 1e9:.2f} billion | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def peak_of(folder: str, asked: ForgetRequest, words: str) -> int:
    """The peak of a way to run, with micro-batches of one row, on an accelerator in bf16."""
    recipe = Recipe.named("npo").changed({}, {"training.precision": "bfloat16"})
    ways = {way.words: way.of(recipe) for way in ways_of(recipe)}
    with (
        mock.patch.object(LM, "device_type", "cuda"),
        mock.patch("delible.train.estimate.matmul_rate", return_value=math.inf),  # no time is told
    ):
        _, cost = plan_of(folder, asked, method=ways[words], micro_batch_tokens=1)
    assert cost is not None
    return cost.memory.peak


def parameters(size: Size) -> int:
    """Weights of a Llama by hand."""
    width = size.hidden // size.heads
    attention = 2 * size.hidden * size.hidden + 2 * size.hidden * size.key_heads * width
    block = attention + 3 * size.hidden * size.inner + 2 * size.hidden
    tables = (1 if size.tied else 2) * size.vocabulary * size.hidden
    return size.layers * block + tables + size.hidden


def first(peaks: dict[str, int], memory: int) -> str:
    """The way that changes least among those that fit, in a table's cell."""
    for words, peak in peaks.items():
        if peak <= memory:
            return f"`{words}`" if words else "as it is"
    return "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--one", choices=list(RUNS))
    parser.add_argument("--only", choices=["measured", "large"])
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one)))
        return
    for name, make in (("measured", measured), ("large", large)):
        if given.only in (None, name):
            table = make()
            if given.markdown:
                write_between(given.markdown, name, table)


if __name__ == "__main__":
    main()
