"""What a system is: anything that answers.

A :class:`System` is asked in batches and waits (measurement); a :class:`Responder` is asked by
many at once and speaks as it goes (serving, agents). ``systems/serving.py`` makes either of the
other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from delible.system.asks import (
    Array,
    Decoding,
    Inspection,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.replies import Piece, Reply


@runtime_checkable
class System(Protocol):
    """Anything that answers: a model, a guarded model, a remote endpoint.

    Attributes:
        name: For people.
        capabilities: ``"generate"`` always; ``"score"`` gives log-probabilities of answers,
            ``"distribution"`` those of the whole vocabulary; ``"hidden"``, ``"weights"`` white-box;
            ``"tools"`` and ``"images"`` if a conversation may have them.
        fingerprint: Changes whenever an answer could change (weights, template, guard);
            the key of the measurement cache. ``None`` means: never cache.

    A system that works for minutes may have an attribute ``on_answers``: while it is asked, a
    function that it calls with the number of answers (their worth of work) whenever it is done.
    """

    name: str
    capabilities: frozenset[str]

    @property
    def fingerprint(self) -> str | None: ...

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers, in the order of the prompts, without the prompt or prefill."""
        ...

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        """Teacher-forced scores; only for systems with the capability ``"score"``."""
        ...

    def inspect(self, requests: Sequence[Inspection]) -> list[Array | NoAnswer]:
        """Looks inside; requests of one kind. Only for white-box systems."""
        ...


@runtime_checkable
class Composed(Protocol):
    """A system with a part that can be taken off again: a guard, an adapter, a patch, a hook."""

    def taken_off(self) -> tuple[str, System] | None:
        """The outermost part, in words, and what is left without it; None if there is none.

        The system itself stays as it is.
        """
        ...


def identity_of(system: System) -> str | None:
    """What does not change from one machine or precision to another: weights, template, parts.

    Systems have it as an attribute ``identity``; otherwise it is their fingerprint.
    """
    return getattr(system, "identity", None) or system.fingerprint


class BlackBox:
    """A system that answers and gives no scores."""

    capabilities = frozenset({"generate"})

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        raise TypeError("this system answers, but gives no scores")

    def inspect(self, requests: Sequence[Inspection]) -> list[Array | NoAnswer]:
        raise TypeError("this system answers, but cannot be looked into")


@runtime_checkable
class Responder(Protocol):
    """Anything that answers many at once."""

    name: str

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer. Cancelling the call ends its work.

        Raises:
            Unanswered: There is none.
        """
        ...

    def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer in pieces, the last one with a finish. Closing the iterator ends its work.

        Raises:
            Unanswered: There is none, or no more.
        """
        ...
