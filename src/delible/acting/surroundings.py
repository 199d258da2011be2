"""What an agent acts in: tools, what is seen at first, and what may be remembered afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from delible.acting.loop import Episode, Tool
from delible.memory import Item


class Surroundings(Protocol):
    """One visit to an environment; another visit begins anew.

    Attributes:
        name: Of the environment, by which everything learned in it can be forgotten.
    """

    @property
    def name(self) -> str: ...

    def tools(self) -> Sequence[Tool]:
        """What can be done."""
        ...

    def opening(self) -> str:
        """What is seen before anything is done."""
        ...

    def notes(self, episode: Episode) -> list[Item]:
        """What an episode shows of the environment, one item for each thing, with its subject."""
        ...


__all__ = ["Surroundings"]
