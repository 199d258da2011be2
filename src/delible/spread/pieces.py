"""What a piece of work is, and whoever does some.

A piece is plain data, and whoever does it gives plain data back; only the caller writes results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Manifest = dict[str, Any]
#: Pieces that must be done one after the other (a later one starts from an earlier one's result).
Chain = Sequence[Any]
#: Does one piece; of other processes and machines it is importable, or can be pickled.
Work = Callable[[Any], Any]
#: Of a piece; those with smaller ones come first where only one is done at a time.
Key = tuple[int, ...]


class Hands(Protocol):
    """Who does pieces of work.

    Attributes:
        at_once: How many pieces are done at once; more may be given, and wait.
    """

    @property
    def at_once(self) -> int: ...

    def give(self, key: Key, piece: Any) -> None:
        """Hands a piece over."""
        ...

    def done(self) -> list[tuple[Key, Any]]:
        """What was finished; waits for it, but not for longer than between two lines of a log.

        Raises:
            Exception: What a piece of work raised.
        """
        ...


__all__ = ["Chain", "Hands", "Key", "Manifest", "Work"]
