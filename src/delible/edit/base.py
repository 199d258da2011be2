"""A closed-form change of a few weights, and the patch that undoes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from delible.context import Context
from delible.errors import ModelError, RunError
from delible.files import atomic_folder
from delible.lm.lm import LM, language_model
from delible.method import ComponentMethod, Outcome
from delible.records import ForgetRequest
from delible.system.base import System


@dataclass(eq=False)
class Patch:
    """A removable edit of weights.

    Attributes:
        factors: For each parameter (left [rows, rank], right [rank, columns]): the change is
            left @ right, in the parameter's own layout.
        before: The parameters' values before the edit, so that undoing is exact; empty while the
            patch is on no model.
        hashes: SHA-256 of the values before, so that it is put on the same ones only.
        kept: What a later edit of the same model needs to know, by name; saved with the patch.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor]
    notes: dict[str, object] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    title: str = "patch"
    kept: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes factors and hashes as safetensors, atomically."""
        tensors = {f"kept/{name}": value for name, value in self.kept.items()}
        hashes = dict(self.hashes)
        for name, (left, right) in self.factors.items():
            tensors |= {f"left/{name}": left, f"right/{name}": right}
        for name, value in self.before.items():
            hashes[name] = _digest(value)
        with atomic_folder(folder) as target:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                target / "patch.safetensors",
                metadata=hashes,
            )

    @classmethod
    def load(cls, folder: Path) -> Patch:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: The file is missing or damaged.
        """
        path = folder / "patch.safetensors"
        try:
            with safe_open(path, framework="pt") as kept:
                hashes = dict(kept.metadata() or {})
                factors = {
                    name: (kept.get_tensor(f"left/{name}"), kept.get_tensor(f"right/{name}"))
                    for name in hashes
                }
                names = [name for name in kept.keys() if name.startswith("kept/")]  # noqa: SIM118
                known = {name.removeprefix("kept/"): kept.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RunError(f"the patch cannot be read ({error}).", where=str(path)) from error
        return cls(factors, {}, hashes=hashes, kept=known)

    @torch.no_grad()
    def apply(self, lm: LM) -> None:
        """Adds the change to a model: the sum in float64, rounded to the weight's own type.

        Raises:
            ModelError: A parameter is missing, or has other values than when the patch was made.
        """
        parameters = dict(lm.core.named_parameters())
        for name, known in self.hashes.items():
            found = parameters.get(name)
            if found is None or _digest(found) != known:
                raise ModelError(
                    f"the patch does not belong to this model: '{name}' is "
                    f"{'missing' if found is None else 'another one'}.",
                    hint="Put it on the model that it was made on.",
                )
        self.before = {name: parameters[name].detach().clone() for name in self.factors}
        for name, (left, right) in self.factors.items():
            weight = parameters[name]
            changed = weight.double() + (left.double() @ right.double()).to(weight.device)
            weight.copy_(changed.to(weight.dtype))
        patches = lm.patches
        lm.touch()
        lm.patches = [*patches, self]

    @torch.no_grad()
    def undo(self, lm: LM) -> None:
        """Puts the edited parameters back, bit by bit.

        Of several patches the last one is undone first: undoing an earlier one takes the later
        ones' changes of the same parameters with it.
        """
        parameters = dict(lm.core.named_parameters())
        for name, value in self.before.items():
            parameters[name].copy_(value)
        patches = [patch for patch in lm.patches if patch is not self]
        lm.touch()
        lm.patches = patches


def _digest(value: Tensor) -> str:
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


class Editor(ComponentMethod):
    """A closed-form change of a few weights."""

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Edits the model in place and returns the patch that undoes it."""
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        lm = language_model(system, f"editor '{self.name}'")
        before = lm.patches
        patch = self.edit(lm, request, seed=context.seed)
        patch.title = f"patch of {self.name}"
        lm.touch()
        lm.patches = [*before, patch]
        return Outcome(lm, "patch", patch, dict(patch.notes))
