"""What a method is: it makes a system forget, by training, a closed-form edit, or a guard.

Whoever runs methods (``unlearn``, benchmarks, searches) asks a method what it needs and what it
is, and never for its kind. What it made goes into an artefact, whose kind it names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from delible.cards import Card, Need
from delible.component import Component
from delible.context import Context
from delible.errors import RecipeError, nearest
from delible.made import Made
from delible.ranges import Range, scales
from delible.records import ForgetRequest
from delible.system.artefact import Base
from delible.system.base import System


@dataclass
class Outcome:
    """What a method made.

    Attributes:
        system: What answers now.
        kind: Of the artefact (``delible list artefacts``).
        content: What is to be kept, in the form of that kind.
        notes: What it had to say, as plain data.
        history: Numbers of every training step; empty where there are none.
        stopped: Why it ended early, if it did.
        remembers: What the next request on the same model is to know; kept with the artefact.
        on: What the artefact stands on, if not on the system that was given: one that holds the
            earlier requests, too, stands on what the artefact before it stood on.
        earlier: What became of earlier requests, in a sentence; empty where none was asked about.
    """

    system: System
    kind: str
    content: Any
    notes: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    remembers: Made | None = None
    on: Base | None = None
    earlier: str = ""


class Method(ABC):
    """A way to make a system forget, with its options.

    Attributes:
        card: What it is and how far to trust it.
    """

    card: Card

    @property
    def name(self) -> str:
        """As people type it."""
        return self.card.name

    @property
    def needs(self) -> frozenset[Need]:
        """What a request must hold, and what else it takes."""
        return frozenset(self.card.needs)

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """The method as plain data, every option included."""

    @abstractmethod
    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same method with other options.

        Raises:
            RecipeError: An unknown option, or a value out of range.
        """

    @abstractmethod
    def as_file(self) -> dict[str, Any]:
        """The content of a YAML file that ``--method FILE`` reads as this method."""

    @abstractmethod
    def option(self, name: str) -> str:
        """The full name of an option: ``objective.beta`` for ``beta``.

        Raises:
            RecipeError: There is no such option, or more than one; offers the nearest.
        """

    @abstractmethod
    def value(self, option: str) -> Any:
        """The value of an option by its full name."""

    def takes(self, option: str) -> bool:
        """Whether it has an option."""
        try:
            return bool(self.option(option))
        except RecipeError:
            return False

    @abstractmethod
    def ranges(self) -> dict[str, Range]:
        """Where a search may look, by the full names of options."""

    def held(self, option: str) -> frozenset[str]:
        """Full names of the options that are not searched where one is held."""
        return frozenset({self.option(option)})

    #: What it makes still gives scores (log-probabilities); false: only answers.
    gives_scores: ClassVar[bool] = True
    #: It works on the weights of a language model; false: on any system.
    needs_model: ClassVar[bool] = True
    #: It works on a model with its adapter on; false: the adapter is merged into the weights first.
    keeps_adapter: ClassVar[bool] = False
    #: It trains the model that it is given, and that model, or an adapter on it, is the result.
    trains_the_model: ClassVar[bool] = False

    def given(self) -> dict[str, Any]:
        """What it takes beside records and options, as plain data."""
        return {}

    def check(self, system: System, request: ForgetRequest) -> None:
        """Refuses what cannot work, before any work.

        Raises:
            DelibleError: With what to do.
        """
        return

    def more_and_less(self, system: System) -> tuple[str, str]:
        """What makes it forget more, and what makes it forget less, in words."""
        words = f"see 'delible show {self.name}' for its options"
        words += f" ({self.card.advice})" if self.card.advice else ""
        return words, words

    @property
    def teaches(self) -> bool:
        """Whether its aim is that its rows are known."""
        return False

    @abstractmethod
    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        """Makes the system forget. A language model may be changed in place.

        Raises:
            DelibleError: It cannot be done.
        """


class ComponentMethod(Component, Method):
    """A method that is one component: its fields are its options."""

    def with_options(self, options: Mapping[str, Any]) -> Self:
        changed = {self.option(name): value for name, value in options.items()}
        return type(self).build(f"{self.card.kind} '{self.name}'", **{**dict(self), **changed})

    def as_file(self) -> dict[str, Any]:
        return {self.card.kind: self.spec()}

    def option(self, name: str) -> str:
        prefix, _, key = name.rpartition(".")
        known = type(self).model_fields
        if key not in known or prefix not in ("", self.name, self.card.kind):
            hint = nearest(key, known) if known else "It has no options."
            raise RecipeError(f"unknown option '{name}'.", where=f"method '{self.name}'", hint=hint)
        return key

    def value(self, option: str) -> Any:
        return getattr(self, option)

    def ranges(self) -> dict[str, Range]:
        return scales(self)
