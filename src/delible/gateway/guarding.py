"""What a gateway asks of a guard besides answers: a verdict, and other targets while it serves.

A guarded system answers like any other; a reply that its guard took back ends with
``content_filter`` and names the guard in ``withheld_by``. These two interfaces are for more. The
gateway looks for them on every layer of what it serves, the outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from delible.lm.lm import LM
from delible.system.asks import Prompt
from delible.system.base import Composed


@dataclass(frozen=True)
class Verdict:
    """What a guard thinks of a conversation, or of an answer to it.

    Attributes:
        allowed: It passes, perhaps with other words than the client's.
        guard: Which one judged.
    """

    allowed: bool
    guard: str


@runtime_checkable
class Checking(Protocol):
    """A system whose guard judges without an answer being made."""

    async def check(self, prompt: Prompt, answer: str | None = None) -> object | None:
        """What the guard decides about a conversation, and about an answer to it if there is one.

        Returns:
            None lets it pass. A decision with a ``prompt`` of its own asks the system that
            instead; any other one is said in place of an answer.

        Raises:
            Unanswered: It cannot be judged.
        """
        ...


def verdict(decision: object | None, guard: str) -> Verdict:
    """A guard's decision in a word: only what is said in place of an answer is a refusal."""
    return Verdict(decision is None or hasattr(decision, "prompt"), guard)


@runtime_checkable
class Retargeted(Protocol):
    """A system whose targets may change while it serves."""

    async def change_targets(self, add: Sequence[str], remove: Sequence[str]) -> int:
        """Adds and removes names, all of them or none; returns how many there are then.

        Raises:
            DelibleError: A name that cannot be guarded, or is not there.
        """
        ...


def layers(system: Any) -> Iterator[Any]:
    """A system, and what is left each time that its outermost part is taken off.

    It ends at a model: taking an adapter from one makes another model.
    """
    while True:
        yield system
        if isinstance(system, LM) or not isinstance(system, Composed):
            return
        taken = system.taken_off()
        if taken is None:
            return
        system = taken[1]
