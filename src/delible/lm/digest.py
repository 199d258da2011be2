"""What weights are, as one hash."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from delible.errors import ModelError
from delible.lm.held import pieces
from delible.lm.sharded import is_share, whole


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, data types and bytes of the state, in hexadecimal.

    Equal for equal weights on every device, whether tensors are tied or equal copies, and
    whatever the order of registration; 135M weights in fp32 take about a second.
    """
    state = _plain(model.state_dict())
    unique: dict[tuple[Any, ...], torch.Tensor] = {}
    keys: dict[str, tuple[Any, ...]] = {}
    for name, tensor in sorted(state.items()):
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        place = 0 if is_share(tensor) else tensor.data_ptr()
        keys[name] = (str(tensor.device), place, str(tensor.dtype), shape, strides)
        if tensor.numel() == 0 or place == 0:
            keys[name] = (name,)
        unique.setdefault(keys[name], tensor)
    if any(map(is_share, unique.values())):  # gathered one by one, in the same order everywhere
        hashes = {key: _tensor_digest(whole(tensor)) for key, tensor in unique.items()}
    else:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            hashes = dict(zip(unique, pool.map(_tensor_digest, unique.values()), strict=True))
    joined = hashlib.sha256()
    for name, key in keys.items():
        tensor = state[name]
        joined.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        joined.update(hashes[key])
    return joined.hexdigest()


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with packed weights as the plain tensors that they are made of."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        parts = [value] if is_share(value) else pieces(value)
        found |= {name: value} if len(parts) == 1 else {
            f"{name}#{place}": part for place, part in enumerate(parts)
        }  # fmt: skip
    return found


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        raise ModelError("the model has no weights in memory (meta device).")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
