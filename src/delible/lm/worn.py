"""What a model wears: adapters beside its weights, patches in them; put on, switched, taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

from delible.errors import ModelError, RunError
from delible.lm.adapters import check_name, names_of
from delible.lm.body import Body
from delible.lm.derive import derive
from delible.lm.identity import Identity
from delible.lm.load import ModelInfo
from delible.lm.saved_adapter import with_adapter


class Removable(Protocol):
    """A change of weights that knows what was there before."""

    title: str

    def undo(self, lm: Any) -> None: ...


class Worn(Body):
    """A model that can wear something.

    Attributes:
        name: For people.
        origin: Where these weights can be loaded again; None: nowhere.
        patches: What was added to the weights and can be taken off again, the last one first.
    """

    name: str
    origin: ModelInfo | None
    patches: list[Removable]
    _identity: Identity

    def copy(self, name: str | None = None) -> Self:
        """An independent copy with its own weights."""
        raise NotImplementedError

    def touch(self) -> None:
        """Says that the weights have changed: those of the adapter, if the model wears one."""
        self._identity.forget()
        self.patches = []
        if not self.wears_adapter:
            self.origin = None

    @property
    def wears_adapter(self) -> bool:
        """Whether a PEFT adapter is on."""
        return hasattr(self.model, "merge_and_unload")

    def wear(self, model: Any) -> None:
        """Takes another form of the same model: with an adapter, or with one merged."""
        self.model = model
        self.anatomy = derive(self.core)  # an adapter moves the matrices to `base_layer`
        self._identity = Identity(model)
        self.touch()

    def merge_adapter(self) -> None:
        """Adds an adapter, if there is one, to the weights: an ordinary model again.

        Raises:
            RunError: The adapter's values are not finite.
        """
        if self.wears_adapter:
            try:
                self.wear(self.model.merge_and_unload(safe_merge=True))
            except ValueError as error:  # what PEFT raises for values that are not finite
                raise RunError(f"the adapter cannot be merged: {error}") from error

    def put_on(self, adapter: Path, name: str | None = None) -> None:
        """Wears a saved PEFT adapter; beside those it has, if a name is given.

        Args:
            name: By which questions ask for it (:attr:`Prompt.adapter`). The first one stays on.

        Raises:
            ModelError: It does not fit, or the name is taken.
        """
        patches, origin = self.patches, self.origin
        if name in names_of(self):
            raise ModelError(f"there is an adapter '{name}' already.", where=self.name)
        below = self.origin.place if self.origin else self.name
        start = self.model if name is not None and self.wears_adapter else self.core
        self.wear(with_adapter(start, adapter, below, name or "default"))
        self.patches, self.origin = patches, origin

    def switch(self, adapter: str) -> None:
        """Turns one of several adapters on, and the others off.

        Raises:
            ModelError: The model has no such adapter.
        """
        check_name(self, adapter)
        patches, origin = self.patches, self.origin
        self.model.set_adapter(adapter)
        self.touch()
        self.patches, self.origin = patches, origin

    def taken_off(self) -> tuple[str, Worn] | None:
        """The adapter, or else the last patch, and a copy of the model without it."""
        if self.wears_adapter:
            bare = self.copy(f"{self.name} without its adapter")
            patches = bare.patches
            bare.wear(bare.model.unload())
            bare.patches = patches
            return "adapter", bare
        if self.patches:
            title = self.patches[-1].title
            bare = self.copy(f"{self.name} without its {title}")
            bare.patches[-1].undo(bare)
            return title, bare
        return None

    def merged(self) -> Self:
        """A plain model with all that it wears in its weights (itself if it wears nothing)."""
        if not self.wears_adapter:
            return self
        twin = self.copy()
        twin.merge_adapter()
        return twin
