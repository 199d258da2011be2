"""A closed-form change of a few weights, and the patch that undoes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
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
        keys: For each parameter the keys that were written to, [width, edits], fp32: what later
            edits leave alone. Empty where an editor does not say.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor]
    notes: dict[str, object] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    title: str = "patch"
    keys: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes factors, keys and hashes as safetensors, atomically."""
        tensors: dict[str, Tensor] = {}
        hashes = dict(self.hashes)
        for name, (left, right) in self.factors.items():
            tensors |= {f"left/{name}": left, f"right/{name}": right}
        tensors |= {f"keys/{name}": value for name, value in self.keys.items()}
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
                known = set(kept.keys())
                keys = {
                    name: kept.get_tensor(f"keys/{name}")
                    for name in hashes
                    if f"keys/{name}" in known
                }
        except (OSError, SafetensorError) as error:
            raise RunError(f"the patch cannot be read ({error}).", where=str(path)) from error
        return cls(factors, {}, hashes=hashes, keys=keys)

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
        self.put_on(lm)

    def put_on(self, lm: LM) -> None:
        """Says that the model has other weights now, and that this patch takes them off again."""
        patches = [patch for patch in lm.patches if patch is not self]
        lm.touch()
        lm.patches = [*patches, self]

    @torch.no_grad()
    def undo(self, lm: LM) -> None:
        """Puts the edited parameters back, bit by bit.

        Of several patches the last one is undone first: in that order every step is exact.
        Undoing an earlier one takes the later ones' changes of the same parameters with it.
        """
        parameters = dict(lm.core.named_parameters())
        for name, value in self.before.items():
            parameters[name].copy_(value)
        patches = [patch for patch in lm.patches if patch is not self]
        lm.touch()
        lm.patches = patches


@contextmanager
def unpatched(lm: LM) -> Iterator[None]:
    """Within it the weights are those below all patches, bit by bit; afterwards as before.

    What is known of a model (statistics of its keys) then serves every later edit of it.
    """
    parameters = dict(lm.core.named_parameters())
    patches = [patch for patch in lm.patches if isinstance(patch, Patch)]
    names = {name for patch in patches for name in patch.before}
    now = {name: parameters[name].detach().clone() for name in names}
    with torch.no_grad():
        for patch in reversed(patches):
            for name, value in patch.before.items():
                parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in now.items():
                parameters[name].copy_(value)


def earlier_keys(lm: LM, parameter: str) -> list[Tensor]:
    """Keys of the edits that a model wears, [width] each, float64, the first edit first."""
    kept = [patch.keys for patch in lm.patches if isinstance(patch, Patch)]
    found = [keys[parameter] for keys in kept if parameter in keys]
    return [key for keys in found for key in keys.to(lm.device).double().T]


def _digest(value: Tensor) -> str:
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


class Editor(ComponentMethod):
    """A closed-form change of a few weights."""

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Edits the model in place and returns the patch that undoes it.

        The model is as it was if anything fails. Patches that it wears stay below the new one.
        """
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        lm = language_model(system, f"editor '{self.name}'")
        patch = self.edit(lm, request, seed=context.seed)
        patch.title = f"patch of {self.name}"
        if patch not in lm.patches:
            patch.put_on(lm)
        return Outcome(lm, "patch", patch, dict(patch.notes))
