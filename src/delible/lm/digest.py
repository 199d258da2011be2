"""What weights are, as one hash."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from delible.errors import ModelError

if TYPE_CHECKING:
    pass


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, data types and bytes of the state, in hexadecimal.

    Equal for equal weights on every device, whether tensors are tied or equal copies, and
    whatever the order of registration; 135M weights in fp32 take about a second.
    """
    state = model.state_dict()
    unique: dict[tuple[Any, ...], torch.Tensor] = {}
    keys: dict[str, tuple[Any, ...]] = {}
    for name, tensor in sorted(state.items()):
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        keys[name] = (str(tensor.device), tensor.data_ptr(), str(tensor.dtype), shape, strides)
        if tensor.numel() == 0 or tensor.is_meta:
            keys[name] = (name,)
        unique.setdefault(keys[name], tensor)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(unique, pool.map(_tensor_digest, unique.values()), strict=True))
    whole = hashlib.sha256()
    for name, key in keys.items():
        tensor = state[name]
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        whole.update(hashes[key])
    return whole.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        raise ModelError("the model has no weights in memory (meta device).")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
