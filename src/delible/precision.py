"""Precision is a policy: what moves is fp32, computed in bf16 where the device does it well.

What is frozen may be shorter (:mod:`delible.lm.held`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
Resolved = Literal["float32", "bfloat16"]
#: In which weights are held that do not move; those that move are fp32.
BasePrecision = Literal["float32", "bfloat16", "int8", "int4"]


def _rate(
    dtype: torch.dtype, device: str, shape: tuple[int, int, int], seconds: float = 0.08
) -> float:
    """Operations per second of products [rows, inner] x [inner, columns]."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    torch.nn.functional.linear(left, right)
    finished(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.nn.functional.linear(left, right)
        finished(device)
        calls += 1
    return calls * 2 * rows * inner * columns / (time.perf_counter() - start)


def finished(device_type: str) -> None:
    """Waits until a device has done what it was told: an accelerator is asked and not watched."""
    if device_type == "cuda":
        torch.cuda.synchronize()


def resolve(precision: Precision, device_type: str) -> Resolved:
    """The precision to compute in: bf16 on accelerators and on a CPU with units for its products.

    What the device is decides, not how fast it is just now: a run that was begun is gone on with
    in the same precision, and what is kept of a model is found again. A CPU with vector
    instructions alone (AVX-512 BF16) is about as fast in fp32, one without them much faster.
    """
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if device_type == "cpu" and has_matrix_units() else "float32"


def has_matrix_units() -> bool:
    """Whether the CPU multiplies matrices of bf16 in units of their own (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def computing_in(precision: Resolved, device_type: str) -> AbstractContextManager[object]:
    """Context in which matrix products run in the given precision over fp32 weights."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16)


def short_types(parameters: Iterable[torch.Tensor]) -> list[str]:
    """Names of the weights' types that are shorter than fp32: small updates round away in them."""
    short = {one.dtype for one in parameters} & {torch.bfloat16, torch.float16}
    return sorted(str(one).removeprefix("torch.") for one in short)


def matmul_rate(precision: Resolved, device_type: str = "cpu") -> float:
    """Measured matrix-product rate in floating-point operations per second."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    shape = (8192, 8192, 8192) if device_type == "cuda" else (1024, 512, 1024)
    return _rate(dtype, device_type, shape, seconds=0.5)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor did not fit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
