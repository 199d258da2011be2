"""Tensors that are computed once, and never lose a gradient that is wanted later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

#: Tensors, or tuples and mappings of them.
T = TypeVar("T")


class computed_once(Generic[T]):  # noqa: N801 (reads like cached_property)
    """A cached property of tensors, which never loses a gradient that is wanted later.

    Values made where gradients are off serve only there and are made anew elsewhere; values made
    with gradient serve both, detached where gradients are off.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"_{name}_once"

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        wanted = torch.is_grad_enabled()
        value, has_gradient = vars(instance).get(self._key, (None, False))
        if value is None or (wanted and not has_gradient):
            value, has_gradient = self._make(instance), wanted
            vars(instance)[self._key] = value, has_gradient
        # what was made without gradient may still carry the tangents of forward mode
        return value if wanted or not has_gradient else _detached(value)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    if isinstance(value, dict):
        return {key: _detached(part) for key, part in value.items()}
    return value
