"""What a model wears: adapters beside its weights, patches in them; put on, switched, taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

import torch

from delible.errors import ModelError, RunError
from delible.lm.adapters import check_name, names_of
from delible.lm.body import Body
from delible.lm.derive import derive
from delible.lm.held import held_in, hold
from delible.lm.identity import Identity
from delible.lm.load import ModelInfo
from delible.lm.merging import change_of, low_rank_changes, untie_changed_tables
from delible.lm.saved_adapter import with_adapter
from delible.precision import BasePrecision, Precision, Resolved, resolve


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

    def gather(self) -> None:
        """Makes a model that is spread over processes an ordinary one again; all processes call it.

        The first process holds the whole model then, where it was before; in the others it has no
        weights any more. A model that is not spread stays as it is.
        """
        if self.sharded is None:
            return
        first = torch.distributed.get_rank() == 0
        model, home, was_training = self.sharded.form, self.sharded.home, self.model.training
        self.sharded.fill(self, first)
        self._identity = self._identity.moved(self.model, model)
        self.model, self.shares_prefix = model.train(was_training), self.sharded.shares_prefix
        self.__dict__.pop("budget", None)
        if first:
            self.model.to(home)
        self.sharded = None

    def _check_whole(self, what: str) -> None:
        if self.sharded is not None:
            raise ModelError(
                f"its weights are spread over processes, and are not {what} so.",
                where=self.name,
                hint="Call gather() in all processes first; the first one holds the model then.",
            )

    def touch(self) -> None:
        """Says that the weights have changed: those of the adapter, if the model wears one."""
        self._identity.forget()
        self.patches = []
        if not self.wears_adapter:
            self.origin = None

    @property
    def base_precision(self) -> BasePrecision | None:
        """In which the weights are held, without those of an adapter; None: another one."""
        return held_in(self.core)

    def hold(self, precision: BasePrecision) -> None:
        """Holds the weights in a shorter precision than fp32: what will not move.

        Raises:
            ModelError: It wears an adapter, or nothing here packs weights.
        """
        if precision in ("float32", self.base_precision):
            return
        if self.wears_adapter:
            raise ModelError(
                f"the model wears an adapter, and only a plain one can be put into {precision}.",
                where=self.name,
                hint="Load it in that precision, or merge the adapter first.",
            )
        origin = None if self.patches else self.origin
        hold(self.core, self.anatomy, precision)
        self._identity = Identity(self.model)
        self.touch()
        self.origin = origin
        self.precision = self.resolved("auto")

    def resolved(self, precision: Precision) -> Resolved:
        """What to compute in: bf16 over weights that are held in it, unless fp32 is demanded."""
        if precision == "auto" and self.base_precision not in ("float32", None):
            return "bfloat16"
        return resolve(precision, self.device_type)

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

        The sums are fp32, rounded to the weights' own precision.

        Raises:
            RunError: The adapter's values are not finite, or the weights are packed.
        """
        if self.wears_adapter:
            if self.base_precision in ("int8", "int4"):
                raise RunError(
                    f"an adapter cannot be merged into weights that are packed in "
                    f"{self.base_precision}.",
                    hint="'delible merge RUN --out FOLDER' merges it into the base's own files.",
                )
            untie_changed_tables(self.model, self.core)
            if self._merged_exactly():
                return
            try:
                self.wear(self.model.merge_and_unload(safe_merge=True))
            except ValueError as error:  # what PEFT raises for values that are not finite
                raise RunError(f"the adapter cannot be merged: {error}") from error

    def _merged_exactly(self) -> bool:
        """Merges low-rank products into weights that are shorter than fp32, or spread, one by one.

        PEFT rounds the product before it adds it, and the sum again; and it puts new tensors where
        shares of the old ones are gathered from.
        """
        self.settle()
        by_one = self.base_precision != "float32" or self.sharded is not None
        changes = low_rank_changes(self.model) if by_one else {}
        for name, (module, on) in changes.items():
            change = change_of(module, on)
            if not bool(change.isfinite().all()):
                raise RunError(f"the adapter cannot be merged: '{name}' is not finite.")
            weight = module.get_base_layer().weight
            with torch.no_grad():
                weight.copy_((weight.float() + change).to(weight.dtype))
        if changes:
            if self.sharded is not None:
                self.sharded.form = self.sharded.form.unload()
            self.wear(self.model.unload())
        return bool(changes)

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
