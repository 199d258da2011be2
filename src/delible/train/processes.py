"""The processes that train together, with settings that no environment variable can change.

Accelerate reads its own variables (``ACCELERATE_GRADIENT_ACCUMULATION_STEPS`` scales gradients,
``ACCELERATE_MIXED_PRECISION`` computes in another precision, ``ACCELERATE_DYNAMO_BACKEND``
compiles). Here gradients are added up, and the precision chosen, by the engine. What says where to
compute (devices, number of processes, FSDP) is left to the environment: it changes no result.
All nodes must run the same versions of what computes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)

from delible.errors import RunError
from delible.lm.sharded import asked_for

T = TypeVar("T")

#: How long a process waits for the others before it ends with an error.
TIMEOUT = timedelta(minutes=15)
#: What must be of the same version in all processes.
SAME = ("delible", "torch", "transformers", "accelerate", "peft", "safetensors")


def gathered(items: list[T], world: int) -> list[T]:
    """What all processes have, in the order of the processes; all of them must call it."""
    return items if world == 1 else list(gather_object(items))


#: Variables of accelerate that would change what is computed.
CHANGING = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
CHANGING_PREFIXES = ("ACCELERATE_DYNAMO_",)


@contextmanager
def plain_environment() -> Iterator[None]:
    """Within it no variable of the environment changes what a library's own trainer computes.

    Such a trainer also sets variables itself; they are put back.
    """
    before = dict(os.environ)
    for name in before:
        if name in CHANGING or name.startswith(CHANGING_PREFIXES):
            del os.environ[name]
    try:
        yield
    finally:
        for name in set(os.environ) | set(before):
            if not name.startswith("ACCELERATE_"):
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def refuse_shares(what: str) -> None:
    """Refuses training that is not spread over processes, where the environment asks for it.

    Raises:
        RunError: It does.
    """
    if asked_for():
        raise RunError(
            f"{what} trains whole models, and the environment spreads them over processes (FSDP).",
            hint="Start without --use_fsdp, or unlearn by a recipe.",
        )


def open_processes(*, inside: bool = False) -> Accelerator:
    """Accelerate with every setting that could change a result given in so many words.

    Args:
        inside: All losses are read off before the model's end, so that no gradient reaches some
            weights, which processes must not wait for.

    Raises:
        RunError: This process has set up accelerate before, in another precision; the environment
            asks for an engine that is not this one; or processes run different versions.
    """
    others = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
    if any(os.environ.get(name, "").lower() == "true" for name in others):
        raise RunError(
            "the engine of training does not hand its steps to DeepSpeed or Megatron-LM, which "
            "clip, accumulate and save by settings of their own.",
            hint="accelerate launch --use_fsdp spreads a model over processes; without it each "
            "process has all of the model.",
        )
    accelerator = _opened(inside)
    _check_versions(accelerator)
    return accelerator


def _check_versions(accelerator: Accelerator) -> None:
    """Refuses processes that would compute differently."""
    mine: dict[str, str] = {}
    for name in SAME:
        try:
            mine[name] = version(name)
        except PackageNotFoundError:
            continue
    for number, other in enumerate(gathered([mine], accelerator.num_processes)):
        if other != mine:
            apart = sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))
            raise RunError(
                f"processes run different versions of {', '.join(apart)}: process "
                f"{accelerator.process_index} has {[mine.get(name) for name in apart]}, process "
                f"{number} has {[other.get(name) for name in apart]}.",
                hint="Install the same versions on all nodes.",
            )


def _opened(inside: bool) -> Accelerator:
    plugin = None
    if asked_for():
        # none of its settings is left to the environment: how a model is spread says lm/sharded.py
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="NO_WRAP",
            cpu_offload=False, activation_checkpointing=False, cpu_ram_efficient_loading=False,
        )  # fmt: skip
    try:
        return Accelerator(
            fsdp_plugin=plugin,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                DistributedDataParallelKwargs(find_unused_parameters=inside),
            ],
            mixed_precision="no",
            # the number alone would be overruled by the environment, a plugin is not
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise RunError(
            "this process has set up accelerate before, with a mixed precision of its own, which "
            "would change the result.",
            hint="Train in a process of its own, or set training.precision instead and make no "
            "Accelerator with mixed_precision.",
        ) from error


@atexit.register
def _parted() -> None:
    """Processes that leave while their group stands may be aborted by its threads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
