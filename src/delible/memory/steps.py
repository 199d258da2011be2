"""The steps of a write. A process may die before any of them; tests let it die there."""

from __future__ import annotations


def reached(step: str) -> None:
    """Called before everything that changes a file, and after the last. It does nothing."""


__all__ = ["reached"]
