"""What a router is: which low-rank products act on which tokens of a model, and how strongly.

A router is kept as files and put on a model (:mod:`delible.routed.system`); nothing of it is in the
weights. Its members are the requests that it answers for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from delible.errors import RunError
from delible.lm.layout import Layout

if TYPE_CHECKING:
    from delible.lm.lm import LM


class Acting(Protocol):
    """A router at work on one model.

    Attributes:
        paths: Modules beside which products stand.
        watched: Modules whose input is to be seen before (:meth:`sees`).
        asks_the_model: Whether its gate asks the bare model (:meth:`prepare`).
        shares: Whether what texts share may be computed once, as long as :meth:`alike` allows it.
    """

    paths: Sequence[str]
    watched: Sequence[str]
    asks_the_model: bool
    shares: bool

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prompts that a call of the backbone will have; the model may be asked now."""
        ...

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        """The logits [row, vocabulary] from which the next tokens of rows are chosen."""
        ...

    def begins(self, layout: Layout, forced: Sequence[str | None] | None, call: Call) -> bool:
        """A call of the backbone begins; whether anything acts in it.

        Args:
            forced: The member that each row is told to use ("" none of them, None as the gate
                says), for rows in the order of the layout's texts; None: as the gate says.
            call: What goes in.
        """
        ...

    def sees(self, path: str, states: Tensor) -> None:
        """What a watched module receives, [token, width]."""
        ...

    def added(self, path: str, received: Tensor) -> Tensor | None:
        """What is added to what a module gives, [token, outer], from what it receives."""
        ...

    def alike(self, shared: int, prompts: Sequence[Sequence[int]], forced: str | None) -> int:
        """How much of a beginning that prompts share is changed alike in all of them."""
        ...


class Call(Protocol):
    """A call of the backbone: what goes in, and the backbone as it is without the router."""

    given: tuple[Any, ...]
    named: dict[str, Any]

    def bare(self, **changes: Any) -> Any:
        """What the backbone gives without the router, on the same input."""
        ...


class Router(ABC):
    """A router, whichever way it decides.

    Attributes:
        form: Names the class in an artefact.
        members: Ids of the requests, the first one first.
        learned_on: Identity of the model that it was made on.
    """

    form: ClassVar[str]
    members: tuple[str, ...]
    learned_on: str | None

    @property
    @abstractmethod
    def identity(self) -> str:
        """SHA-256: equal ones do the same to the same model."""

    @abstractmethod
    def acting(self, lm: LM) -> Acting:
        """At work on a bare model.

        Raises:
            ModelError: It does not fit.
        """

    @abstractmethod
    def save(self, folder: Path, base: str) -> dict[str, str]:
        """Writes its parts; returns their relative paths by name.

        Args:
            base: Name of the model that it is for.
        """

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, parts: dict[str, str]) -> Router:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: A part cannot be read.
        """

    @abstractmethod
    def without(self, names: Sequence[str]) -> Router:
        """The router without some members, the others exactly as they are.

        Raises:
            RunError: It has no such member, or it cannot be taken out alone; says why.
        """

    def named(self, names: Sequence[str]) -> tuple[str, ...]:
        """The ids of requests, from their ids or beginnings of them that are like no other.

        Raises:
            RunError: It has no such request, or several; names those that it has.
        """
        found = []
        for name in names:
            fitting = [one for one in self.members if one.startswith(name)]
            if name in self.members:
                fitting = [name]
            if not name or len(fitting) != 1:
                told = f"the router has {'several requests' if fitting else 'no request'} '{name}'."
                raise RunError(
                    told,
                    where="router",
                    hint=f"It has: {', '.join(self.members)}." if self.members else "It has none.",
                )
            found += fitting
        return tuple(dict.fromkeys(found))


__all__ = ["Acting", "Call", "Router"]
