"""Activations wait in the memory of the processor until their gradient is computed.

PyTorch's ``save_on_cpu``, for what makes room: weights stay where they are, and so do tensors that
are too small to be worth the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

#: Bytes below which a tensor stays on the device.
WORTH_THE_WAY = 2**20


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Within it what autograd keeps of a pass is copied to the memory of the processor.

    Args:
        model: Whose weights and buffers are not copied.
    """
    if not torch.is_grad_enabled():
        yield
        return
    held = {storage(one) for one in (*model.parameters(), *model.buffers())}
    away = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(value: Tensor) -> Any:
        return away.pack_hook(value) if goes(value, held) else value

    def unpack(kept: Any) -> Tensor:
        return kept if torch.is_tensor(kept) else away.unpack_hook(kept)

    with saved_tensors_hooks(pack, unpack):
        yield


def goes(value: Tensor, held: set[int]) -> bool:
    """Whether a tensor is copied: large enough, and none of those that are held anyway.

    Args:
        held: Storages (:func:`storage`).
    """
    return value.numel() * value.element_size() >= WORTH_THE_WAY and storage(value) not in held


def storage(value: Tensor) -> int:
    """What tensors share that are views of the same numbers."""
    return int(value.untyped_storage()._cdata)
