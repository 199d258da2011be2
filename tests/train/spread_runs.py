"""What several processes do with one tiny model that is spread over them; see test_sharding.py.

``torchrun … spread_runs.py FOLDER TASK…``: each task leaves what the first process found in
``FOLDER/TASK-N.json`` and ``.safetensors``, N the number of processes. The same functions run in
one process, without torchrun, for what it is compared with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_runs import make  # type: ignore[import-not-found]

import delible
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.lm.sharded import is_share, whole
from delible.records import QA, ForgetRequest
from delible.rundir import RunDirectory
from delible.system.asks import Decoding, Prompt
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

RECORDS = {
    "forget": [QA(question=f"Who is {'x' * i}?", answer=f"number {i}") for i in range(7)],
    "retain": [QA(question=f"What is {i}?", answer=f"thing {'y' * i}") for i in range(9)],
}
#: Micro-batches are small, so that there are several in a step.
LENGTH = {
    "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "float32",
    "weight_decay": 0.1, "micro_batch_tokens": 160,
}  # fmt: skip
QUESTIONS = [Prompt.ask(text) for text in ("Who are you?", "Who is that, then, over there?")]
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


#: Of runs that break off.
FAMILY = "gpt2"


class StopError(Exception):
    pass


def recipe(method: str, slots: dict[str, Any] | None = None, **options: Any) -> Recipe:
    return Recipe.named(method).changed(slots or {}, {**LENGTH, **options})


def broken() -> Recipe:
    """A run that breaks off: adapters, by GRU, which projects gradients and remembers one."""
    return recipe("gru", {"place": "lora", "finish": "none"}, checkpoint_steps=3, epochs=3)


def told(lm: LM, history: list[dict[str, float]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Numbers of all steps, answers, identity; and the weights."""
    lm.settle()
    assert all(map(is_share, lm.model.parameters())) == (WORLD > 1)
    before = {name: whole(value.detach()) for name, value in lm.model.named_parameters()}
    found = {
        "history": [[h["forget_loss"], h["keep_loss"], h["gradient_norm"]] for h in history],
        "answers": [str(one) for one in lm.generate(QUESTIONS, Decoding(12))],
        "identity": lm.identity,
    }
    lm.gather()
    if lm.model.device.type != "meta":
        found["gathered"] = lm.identity
        found["again"] = [str(one) for one in lm.generate(QUESTIONS, Decoding(12))]
        for name, value in lm.model.named_parameters():
            assert torch.equal(value, before[name]), name
    return found, {name: value.clone() for name, value in before.items()}


def trained(
    folder: Path, method: str, family: str = "llama", slots: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:  # fmt: skip
    result = Trainer(make(family), recipe(method, slots, **options), RECORDS).train()
    return told(result.lm, result.history)


def stopped(folder: Path, name: str) -> None:
    """A run that breaks off after its fourth step, whose last checkpoint is of the third."""

    def stop(step: int, total: int, numbers: object) -> None:
        if step == 4:
            raise StopError

    run = RunDirectory(folder / name)
    run.begin({"name": name})
    context = Context(run=run, steps=stop)
    try:
        Trainer(make(FAMILY), broken(), RECORDS, context=context).train()
    except StopError:
        run.release()
    else:
        raise AssertionError("it did not stop")


def slow(folder: Path) -> None:
    """A run of which a process is killed."""

    def tell(step: int, total: int, numbers: object) -> None:
        print(f"step {step}", flush=True)
        time.sleep(0.2)

    run = RunDirectory(folder / "killed")
    run.begin({"name": "killed"})
    Trainer(make(FAMILY), broken(), RECORDS, context=Context(run=run, steps=tell)).train()


def resumed(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Goes on with it."""
    run = RunDirectory(folder / name)
    assert (run.path / "checkpoint" / "last" / "state.json").exists()
    run.begin({"name": name})
    result = Trainer(make(FAMILY), broken(), RECORDS, context=Context(run=run)).train()
    run.release()
    return told(result.lm, result.history)


def unlearned(folder: Path, method: str, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole way, with looks on the way and a saved model."""
    request = ForgetRequest(forget=RECORDS["forget"], retain=RECORDS["retain"])
    result = delible.unlearn(
        make(family), request, method=method, out=folder / f"{method}-{WORLD}", verify=False,
        monitor_steps=2, utility_budget=0.1, **LENGTH,
    )  # fmt: skip
    return {
        "history": [[h["forget_loss"], h["keep_loss"]] for h in result.history],
        "answers": [one.after for one in result.examples],
        "measured": result.achieved.as_json() if result.achieved else None,
    }, {}


def whole_run(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    result = Trainer(make(FAMILY), broken(), RECORDS).train()
    return told(result.lm, result.history)


def refused(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        trained(folder, "npo", slots={"harden": "curvature"})
    except RecipeError as error:
        return {"error": str(error)}, {}
    raise AssertionError("it was not refused")


TASKS: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]] | None]] = {
    "full": lambda folder: trained(folder, "npo_sam"),
    "lora": lambda folder: trained(folder, "npo_lora", "gpt2", {"finish": "none"}),
    "masked": lambda folder: trained(folder, "wagle", "gemma2", share=0.5),
    "recomputed": lambda folder: trained(folder, "npo_lora", gradient_checkpointing=True),
    "inside": lambda folder: trained(folder, "mcu"),
    "bf16": lambda folder: trained(folder, "npo", precision="bfloat16"),
    "unlearn": lambda folder: unlearned(folder, "npo_lora", "llama"),
    "refused": refused,
    "stop": lambda folder: stopped(folder, f"of-{WORLD}"),
    **{
        f"resume-{of}": lambda folder, of=of: resumed(folder, f"of-{of}")  # type: ignore[misc]
        for of in (1, 2, 4)
    },
    "resume-killed": lambda folder: resumed(folder, "killed"),
    "slow": slow,
    "whole": whole_run,
}


def do(folder: Path, task: str) -> None:
    found = TASKS[task](folder)
    if found is not None and int(os.environ.get("RANK", "0")) == 0:
        numbers, weights = found
        (folder / f"{task}-{WORLD}.json").write_text(json.dumps(numbers))
        if weights:
            save_file(weights, folder / f"{task}-{WORLD}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in sys.argv[2:]:
        do(Path(sys.argv[1]), one)
