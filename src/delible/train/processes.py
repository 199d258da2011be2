"""The processes that train together, with settings that no environment variable can change.

Accelerate reads its own variables (``ACCELERATE_GRADIENT_ACCUMULATION_STEPS`` scales gradients,
``ACCELERATE_MIXED_PRECISION`` computes in another precision, ``ACCELERATE_DYNAMO_BACKEND``
compiles). Here gradients are added up, and the precision chosen, by the engine. What says where to
compute (devices, number of processes, FSDP) is left to the environment: it changes no result.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object

from delible.errors import RunError

T = TypeVar("T")


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


def open_processes() -> Accelerator:
    """Accelerate with every setting that could change a result given in so many words.

    Raises:
        RunError: This process has set up accelerate before, in another precision.
    """
    try:
        return Accelerator(
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
