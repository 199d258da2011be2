"""What a gateway asks of a guard besides answers: a verdict, and other targets while it serves.

A guarded system answers like any other; a reply that its guard took back ends with
``content_filter`` and names the guard in ``withheld_by``. These interfaces are for more. The
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
        guard: Which one judged; of several that all let it pass, each.
        failed: Its judgement came to nothing, which is no pass.
    """

    allowed: bool
    guard: str
    failed: bool = False


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


async def verdict(
    checks: Sequence[tuple[str, Checking]], prompt: Prompt, answer: str | None
) -> Verdict:
    """What all guards together think, each in its turn and of what the one before it would ask.

    Only what is said in place of an answer is a refusal. Where a guard asks another system, those
    behind it are not asked, as they would not be for an answer.

    Args:
        checks: Names and guards, the outermost first.
        prompt: The conversation.
        answer: An answer to it.

    Raises:
        Unanswered: It cannot be judged.
    """
    passed: list[str] = []
    for name, one in checks:
        decision = await one.check(prompt, answer)
        if decision is not None and not hasattr(decision, "prompt"):
            return Verdict(False, name, bool(getattr(decision, "failed", False)))
        passed.append(name)
        prompt = getattr(decision, "prompt", prompt)
        if getattr(decision, "system", None) is not None:
            break
    return Verdict(True, "+".join(passed))


@runtime_checkable
class Retargeted(Protocol):
    """A system whose targets may change while it serves."""

    async def change_targets(self, add: Sequence[str], remove: Sequence[str]) -> int:
        """Adds and removes names, all of them or none; returns how many there are then.

        Raises:
            DelibleError: A name that cannot be guarded, or is not there.
        """
        ...


@runtime_checkable
class Following(Protocol):
    """A system that follows a file."""

    async def look(self) -> None:
        """Looks whether the file has changed, and goes by what it says then. Never raises."""
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
