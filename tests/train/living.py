"""Bytes of real tensors, counted for as long as they live."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """The most bytes that tensors which are made inside hold at once, by address."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None):  # type: ignore[no-untyped-def]
        inputs = tree_leaves((given, named))
        known = {one.untyped_storage().data_ptr() for one in inputs if isinstance(one, Tensor)}
        found = function(*given, **(named or {}))
        for one in tree_leaves(found):
            if not isinstance(one, Tensor) or one.untyped_storage().data_ptr() in known:
                continue
            storage = one.untyped_storage()
            if storage.data_ptr() not in self.sizes:
                self.sizes[storage.data_ptr()] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr())
        return found

    def _gone(self, address: int) -> None:
        self.now -= self.sizes.pop(address)
