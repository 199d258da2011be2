"""What one accelerator makes of the same code: training steps, answers, an audit.

For the default model and for one with the shape of an 8B Llama and random weights, in one process:

- seconds of an optimiser step, tokens per second, the share of the measured matrix-product rate
  that its operations are, and the peak of the accelerator's memory;
- tokens per second of greedy answers, many prompts at once and one alone;
- for the default model, seconds of a quick audit of the demo's world after NPO.

Rates of matrix products are measured on the same machine first. Nothing here compares two
machines: every number stands beside the peak that it is a share of.

Run: python performance/gpu.py gpu.json [--markdown docs/scale.md] [--models default,8b]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import FORGET, RETAIN, prepare, recipe, write_between
from transformers import AutoModelForCausalLM, LlamaConfig

from delible.api import unlearn
from delible.audit.run import audit
from delible.context import Context
from delible.demo import learn, request_of, world_of
from delible.errors import ModelError
from delible.files import write_json
from delible.lm.lm import LM
from delible.precision import finished, matmul_rate
from delible.rundir import git_revision, hardware, versions
from delible.system.asks import Decoding, Prompt
from delible.train.engine import Trainer
from delible.train.estimate import body_parameters
from delible.train.plan import make_plan
from delible.train.rows import make_rows

#: The shape of Llama 3.1 8B.
EIGHT_B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192,
    tie_word_embeddings=False,
)  # fmt: skip
#: Methods by model: full weights of 8B in fp32 with their moments fit no single device.
METHODS = {"default": ("npo", "npo_lora", "rmu"), "8b": ("npo_lora", "rmu")}


def accelerator() -> str:
    """The kind of device that is measured.

    Raises:
        ModelError: There is none.
    """
    if not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here.", hint="performance/training.py: CPUs.")
    return "cuda"


def loaded(name: str) -> LM:
    """The model, on the device."""
    default = LM.load("default")
    if name == "default":
        return default
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(EIGHT_B, dtype=torch.float32)
    return LM(model.eval(), default.tokenizer, name="8b-random")


def step(lm: LM, method: str, rows: int, steps: int) -> dict[str, float]:
    """One method's optimiser steps; the first, which prepares, is told apart."""
    chosen = recipe(method, steps, rows)
    forget, retain = make_rows(lm.template, FORGET), make_rows(lm.template, RETAIN)
    plan = make_plan(chosen, forget, retain, 0)
    tokens = sum(
        len(forget[i].encoded.ids) + (len(retain[j].encoded.ids) if j is not None else 0)
        for one in plan.steps
        for i, j in one
    ) / len(plan.steps)
    times: list[float] = []
    last = time.perf_counter()

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        finished("cuda")
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    torch.cuda.reset_peak_memory_stats()
    Trainer(
        lm, chosen, {"forget": FORGET, "retain": RETAIN}, context=Context(steps=progress)
    ).train()
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    operations = 6.0 * body_parameters(lm) * tokens
    return {
        "rows": rows,
        "first_seconds": times[0],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": operations / seconds / matmul_rate(lm.precision, "cuda"),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def answers(lm: LM, rows: int, tokens: int) -> dict[str, float]:
    """Tokens per second of greedy answers."""
    decoding = Decoding(max_new_tokens=tokens)
    asked = [Prompt.ask(f"Write the numbers from {one} on, in words.") for one in range(rows)]

    def rate(prompts: list[Prompt]) -> float:
        began = time.perf_counter()
        told = [one for one in lm.generate(prompts, decoding) if isinstance(one, str)]
        finished("cuda")
        made = sum(len(lm.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in told)
        return made / (time.perf_counter() - began)

    rate(asked[:4])
    return {"rows": rows, "tokens": tokens, "batch": rate(asked), "alone": rate(asked[:1])}


def audited() -> dict[str, float]:
    """Seconds of the demo's story: unlearning by NPO, and a quick audit."""
    split = world_of()
    request = request_of(split)
    target = learn("default", split.records("known"), 0, "target")
    reference = learn("default", split.records("kept"), 0, "reference")
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        unlearn(str(target), request, method="npo", out=Path(folder) / "npo", shown=0)
        unlearned = time.perf_counter() - began
        began = time.perf_counter()
        audit(
            str(Path(folder) / "npo"), request, before=str(target), reference=str(reference),
            depth="quick", out=Path(folder) / "audit",
        )  # fmt: skip
        return {"unlearn_seconds": unlearned, "quick_audit_seconds": time.perf_counter() - began}


def tried(what: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What was measured, or why not."""
    try:
        return what()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def table(found: Mapping[str, Any]) -> str:
    """The Markdown of a JSON file's content."""
    machine = found["hardware"]
    lines = [
        f"{machine['accelerator']}, torch {found['versions']['torch']}, measured matrix-product "
        f"rate {found['matmul_rate'] / 1e12:.0f} TFLOP/s in {machine['precision']}.\n",
        "| model | what | rows | seconds | tokens per second | share of the rate | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, told in found["models"].items():
        for method, one in told["steps"].items():
            if "failed" in one:
                lines.append(f"| {name} | step of `{method}` | | | | {one['failed']} | |")
                continue
            lines.append(
                f"| {name} | step of `{method}` | {one['rows']} | {one['seconds']:.3f} | "
                f"{one['tokens_per_second']:.0f} | {one['share_of_peak']:.0%} | "
                f"{one['peak_gib']:.1f} |"
            )
        said = told["answers"]
        if "failed" not in said:
            for what, rows in (("batch", said["rows"]), ("alone", 1)):
                lines.append(f"| {name} | greedy answers | {rows} | | {said[what]:.0f} | | |")
    if "audit" in found and "failed" not in found["audit"]:
        one = found["audit"]
        lines += [
            "",
            "The demo's world with the default model: unlearning by NPO "
            f"{one['unlearn_seconds']:.0f} s, a quick audit of it "
            f"{one['quick_audit_seconds']:.0f} s.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("numbers", type=Path, help="the JSON file to write")
    parser.add_argument("--models", default="default,8b")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--markdown", type=Path, help="replace the measured table in this page")
    given = parser.parse_args()
    kind = accelerator()
    prepare(given.rows)
    found: dict[str, Any] = {
        "hardware": hardware(), "versions": versions(), "git": git_revision(),
        "matmul_rate": matmul_rate("bfloat16", kind), "models": {},
    }  # fmt: skip
    for name in given.models.split(","):
        lm = loaded(name)
        steps = {
            method: tried(lambda lm=lm, m=method: step(lm, m, given.rows, given.steps))  # type: ignore[misc]
            for method in METHODS[name]
        }
        said = tried(lambda lm=lm: answers(lm, 64, 64))  # type: ignore[misc]
        found["models"][name] = {"steps": steps, "answers": said}
        del lm
        write_json(given.numbers, found)
        print(name, found["models"][name], flush=True)
    if "default" in given.models:
        found["audit"] = tried(audited)
        write_json(given.numbers, found)
    print(table(found))
    if given.markdown:
        write_between(given.markdown, "gpu", table(found))


if __name__ == "__main__":
    main()
