"""What one accelerator makes of the same code: training steps, answers, an audit, vLLM.

For the default model and for one with the shape of an 8B Llama and random weights, in one process:

- seconds of an optimiser step, tokens per second, the share of the measured matrix-product rate
  that its operations are, and the peak of the accelerator's memory;
- tokens per second of greedy answers, many prompts at once and one alone;
- for the default model, seconds of a quick audit of the demo's world after NPO;
- where vLLM is installed, its tokens per second with the default model, and how far its scores and
  greedy answers are from those of the engine.

Rates of matrix products are measured on the same machine first. Nothing here compares two
machines: every number stands beside the peak that it is a share of. After ``--minutes`` nothing
more is begun; what was left out says so in the JSON file, which is written after every part.

Run: python performance/gpu.py gpu.json [--markdown docs/scale.md] [--models default,8b]

``--dry`` goes the same road on a processor with tiny models in a minute or two, to see that it can
be gone; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import FORGET, RETAIN, forget_peak, peak_gib, prepare, recipe, write_between
from transformers import AutoModelForCausalLM, LlamaConfig

from delible.api import unlearn
from delible.audit.choice import ROWS
from delible.audit.run import audit
from delible.context import Context
from delible.demo import learn, request_of, world_of
from delible.errors import ModelError
from delible.files import write_json
from delible.lm.lm import LM
from delible.precision import finished, matmul_rate
from delible.rundir import git_revision, hardware, versions
from delible.system.asks import Decoding, Prompt, Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.systems.vllm import VLLM
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
#: The same, small enough for a dry run.
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 4096,
}  # fmt: skip
#: Methods by model: full weights of 8B in fp32 with their moments fit no single device.
METHODS = {"default": ("npo", "npo_lora", "rmu"), "8b": ("npo_lora", "rmu")}


@dataclass(frozen=True)
class Machine:
    """What is measured on.

    Attributes:
        kind: Of the device.
        dry: On a processor with tiny models.
        ends: When nothing more is begun, on the monotonic clock.
    """

    kind: str
    dry: bool
    ends: float

    @property
    def default(self) -> str:
        """The model that stands for itself."""
        return "tiny" if self.dry else "default"

    def forget_peak(self) -> None:
        """Starts the count of the memory's peak anew."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def peak_gib(self) -> float:
        """Peak memory since then: of the accelerator, or of this process."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.kind == "cuda" else peak_gib()


def machine(dry: bool, minutes: float) -> Machine:
    """What to measure on.

    Raises:
        ModelError: There is no accelerator.
    """
    if not dry and not torch.cuda.is_available():
        raise ModelError(
            "there is no CUDA device here.",
            hint="performance/training.py measures processors; --dry only tries this road.",
        )
    return Machine("cpu" if dry else "cuda", dry, time.monotonic() + 60 * minutes)


def loaded(name: str, on: Machine) -> LM:
    """The model, on the device."""
    default = LM.load(on.default, device=on.kind)
    if name == "default":
        return default
    shape = EIGHT_B
    if on.dry:
        shape = LlamaConfig(**{**EIGHT_B.to_dict(), **SMALL, "head_dim": None})
    with torch.device(on.kind):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    return LM(model.eval(), default.tokenizer, name="8b-random")


def step(lm: LM, method: str, rows: int, steps: int, on: Machine) -> dict[str, float]:
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
        finished(on.kind)
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    on.forget_peak()
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
        "share_of_peak": operations / seconds / matmul_rate(lm.precision, on.kind),
        "peak_gib": on.peak_gib(),
    }


def answers(lm: LM, rows: int, tokens: int, on: Machine) -> dict[str, float]:
    """Tokens per second of greedy answers."""
    decoding = Decoding(max_new_tokens=tokens)
    asked = [Prompt.ask(f"Write the numbers from {one} on, in words.") for one in range(rows)]

    def rate(prompts: list[Prompt]) -> float:
        began = time.perf_counter()
        told = [one for one in lm.generate(prompts, decoding) if isinstance(one, str)]
        finished(on.kind)
        made = sum(len(lm.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in told)
        return made / (time.perf_counter() - began)

    rate(asked[:4])
    return {"rows": rows, "tokens": tokens, "batch": rate(asked), "alone": rate(asked[:1])}


def audited(on: Machine) -> dict[str, float]:
    """Seconds of the demo's story: unlearning by NPO, and a quick audit."""
    split = world_of(4, 1) if on.dry else world_of()
    request, options = request_of(split), {"max_steps": 2} if on.dry else {}
    target = learn(on.default, split.records("known"), 0, "target")
    reference = learn(on.default, split.records("kept"), 0, "reference")
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        unlearn(str(target), request, method="npo", out=Path(folder) / "npo", shown=0, **options)
        unlearned = time.perf_counter() - began
        began = time.perf_counter()
        audit(
            str(Path(folder) / "npo"), request, before=str(target), reference=str(reference),
            depth="quick", out=Path(folder) / "audit", attacks=["prefix"] if on.dry else None,
            rows=2 if on.dry else ROWS,
        )  # fmt: skip
        return {"unlearn_seconds": unlearned, "quick_audit_seconds": time.perf_counter() - began}


def behind_vllm(rows: int, tokens: int, on: Machine) -> dict[str, Any]:
    """vLLM's tokens per second, and how far it is from the engine, with the default model."""
    if find_spec("vllm") is None:
        return {"failed": "vLLM is not installed"}
    lm = LM.load(on.default, device=on.kind)
    vllm = VLLM.load(on.default, dtype=lm.precision, enforce_eager=on.dry)
    decoding = Decoding(max_new_tokens=tokens)
    asked = [Prompt.ask(f"Write the numbers from {one} on, in words.") for one in range(rows)]
    vllm.generate(asked[:4], decoding)
    began = time.perf_counter()
    told = vllm.generate(asked, decoding)
    seconds = time.perf_counter() - began
    made = sum(
        len(lm.tokenizer(one, add_special_tokens=False)["input_ids"])
        for one in told
        if isinstance(one, str)
    )
    same = [mine == other for mine, other in zip(lm.generate(asked, decoding), told, strict=True)]
    requests = [Score(prompt, answer_of(one)) for one in FORGET if (prompt := ask(one)) is not None]
    apart = [
        np.abs(mine.logprobs - other.logprobs).max()
        for mine, other in zip(lm.score(requests), vllm.score(requests), strict=True)
        if isinstance(mine, TokenScores) and isinstance(other, TokenScores)
    ]
    return {
        "rows": rows,
        "tokens": tokens,
        "precision": lm.precision,
        "batch": made / seconds,
        "same_greedy_answers": sum(same) / len(same),
        "scores_compared": len(apart),
        "largest_difference_in_nats": float(max(apart)),
    }


def tried(what: Callable[[], dict[str, Any]], on: Machine) -> dict[str, Any]:
    """What was measured, or why not."""
    if time.monotonic() > on.ends:
        return {"failed": "not begun: the time was over"}
    try:
        return what()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        if on.kind == "cuda":
            torch.cuda.empty_cache()


def table(found: Mapping[str, Any]) -> str:
    """The Markdown of a JSON file's content."""
    machine = found["hardware"]
    lines = [
        f"{machine['accelerator'] or machine['machine']}, torch {found['versions']['torch']}, "
        "measured matrix-product "
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
    if "failed" not in found["vllm"]:
        one = found["vllm"]
        lines += [
            "",
            f"vLLM with the default model in {one['precision']}: {one['batch']:.0f} tokens per "
            f"second of {one['rows']} greedy answers, {one['same_greedy_answers']:.0%} of them the "
            f"engine's; over {one['scores_compared']} scored answers a token's log-probability "
            f"differs by {one['largest_difference_in_nats']:.3f} nats at most.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("numbers", type=Path, help="the JSON file to write")
    parser.add_argument("--models", default="default,8b")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--markdown", type=Path, help="replace the measured table in this page")
    parser.add_argument("--minutes", type=float, default=9.0, help="then nothing more is begun")
    parser.add_argument("--dry", action="store_true", help="on a processor, with tiny models")
    given = parser.parse_args()
    on = machine(given.dry, given.minutes)
    if on.dry:  # one process, one import of torch
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows, tokens = (2, 8) if on.dry else (64, 64)
    prepare(given.rows)
    found: dict[str, Any] = {
        "hardware": hardware(), "versions": versions(), "git": git_revision(), "dry": on.dry,
        "matmul_rate": matmul_rate("float32" if on.dry else "bfloat16", on.kind), "models": {},
    }  # fmt: skip
    for name in given.models.split(","):
        lm = loaded(name, on)
        steps = {
            method: tried(lambda lm=lm, m=method: step(lm, m, given.rows, given.steps, on), on)  # type: ignore[misc]
            for method in METHODS[name]
        }
        said = tried(lambda lm=lm: answers(lm, rows, tokens, on), on)  # type: ignore[misc]
        found["models"][name] = {"steps": steps, "answers": said}
        del lm
        write_json(given.numbers, found)
        print(name, found["models"][name], flush=True)
    if "default" in given.models:
        found["audit"] = tried(lambda: audited(on), on)
        write_json(given.numbers, found)
    found["vllm"] = tried(lambda: behind_vllm(rows, tokens, on), on)
    write_json(given.numbers, found)
    print(table(found))
    if given.markdown:
        write_between(given.markdown, "gpu", table(found))


if __name__ == "__main__":
    main()
