"""The models that a module is made of: itself, or those that are asked as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cores_of(core: Any) -> Sequence[Any]:
    """Itself; of several models that are asked as one (:mod:`delible.lm.joint`) each, in order."""
    return getattr(core, "models", None) or (core,)


__all__ = ["cores_of"]
