"""A model beside whose weights something stands that changes its answers: hooks, a router.

The weights are shared with the bare model and never touched, so what stands beside them is taken
off without a trace; it is not in a saved or merged model, and says so.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from delible.errors import RunError
from delible.lm.body import Budget
from delible.lm.layout import asked
from delible.lm.lm import LM


class Beside(LM):
    """A model with something beside its weights; asked like any model.

    What goes through the engine is changed: generating, scoring, inspecting, serving. ``model`` is
    the bare module; calling it directly gives the bare model's values.

    Args:
        bare: The model without it; it shares its weights, and can be asked at the same time.
        called: What stands beside it, for the name.
        own_rows: Whether each text must have a row of its own: no tree, no shared beginning.
    """

    in_weights: ClassVar[bool] = False
    #: What it is, and what can be done instead of putting it into the weights.
    what: ClassVar[str]
    unmerged_hint: ClassVar[str]
    unsaved_hint: ClassVar[str]

    def __init__(self, bare: LM, called: str, *, own_rows: bool) -> None:
        vars(self).update(vars(bare))
        self.bare = bare
        self.name = f"{bare.name} + {called}"
        self.on_answers = None
        self.interveners = object()
        if own_rows:
            self.grows_trees = self.shares_prefix = False
            self.road = "plain" if bare.road == "plain" else "padded"

    @abstractmethod
    def on(self, bare: LM) -> Self:
        """The same beside another model's weights."""

    @property
    @abstractmethod
    def besides(self) -> Sequence[str]:
        """Identities of what stands beside the weights, in order."""

    @abstractmethod
    def intervening(self) -> AbstractContextManager[None]:
        """Within it what stands beside the weights acts."""

    @property
    @abstractmethod
    def unmerged(self) -> str:
        """Why it cannot be in the weights."""

    @property
    def fingerprint(self) -> str:
        """That of the bare model, and what acts on it in which order."""
        below = (self.bare.fingerprint, self.template.fingerprint, self.precision)
        return hashlib.sha256("/".join([*below, *self.besides]).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """The same in every precision."""
        return identity_with(self.bare, self.besides)

    @property
    def budget(self) -> Budget:  # type: ignore[override]
        """That of the bare model."""
        return self.bare.budget

    def touch(self) -> None:
        """Says that the weights have changed."""
        self.bare.touch()
        self.origin = self.bare.origin

    def wear(self, model: Any) -> None:
        """Takes another form of the same model; what stands beside the weights stays."""
        self.bare.wear(model)
        again = self.on(self.bare)
        again.name, again.on_answers = self.name, self.on_answers
        vars(self).update(vars(again))

    def copy(self, name: str | None = None) -> Self:
        """An independent copy with its own weights, and the same beside them."""
        twin = self.on(self.bare.copy())
        twin.name = name or self.name
        return twin

    def merged(self) -> NoReturn:
        """It is not in the weights.

        Raises:
            RunError: Always.
        """
        raise RunError(f"{self.unmerged}.", hint=self.unmerged_hint)

    def save(self, folder: Path) -> None:
        """Refused: the weights alone are another model.

        Raises:
            RunError: Always.
        """
        raise RunError(
            f"{self.what} is not in the weights, so a saved model would answer differently.",
            where=str(folder),
            hint=self.unsaved_hint,
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the model is in evaluation mode, and what stands beside it acts."""
        with self.intervening(), asked(self.interveners), super().evaluating():
            yield


def identity_with(bare: LM, besides: Sequence[str]) -> str:
    """The identity of a model with something beside its weights, or with nothing."""
    if not besides:
        return bare.identity
    return hashlib.sha256("/".join([bare.identity, *besides]).encode()).hexdigest()
