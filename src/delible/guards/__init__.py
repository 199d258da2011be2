"""Guards: they stand before a system at inference time and change no weight."""

from __future__ import annotations

from typing import Any

from delible.component import build
from delible.guards.base import Guard, GuardedSystem, GuardMind
from delible.measure.requests import System
from delible.records import ForgetRequest

__all__ = ["Guard", "GuardMind", "GuardedSystem", "guard"]


def guard(
    system: System, request: ForgetRequest, name: str = "target_detector", **options: Any
) -> GuardedSystem:
    """Puts a guard before a system.

    Args:
        system: What is guarded: a model, an endpoint, another guarded system.
        request: What must not come out.
        name: Name of the guard (``delible list guards``).
        **options: The guard's options (``delible show NAME``).

    Returns:
        A system that generates and gives no scores.

    Raises:
        RecipeError: An unknown guard or option.
        DataError: The request gives this guard nothing to go by.
    """
    mind = build("guard", {"name": name, **options}).prepare(request)
    return GuardedSystem(system, mind, f"{system.name} + {name}")
