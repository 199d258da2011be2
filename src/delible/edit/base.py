"""A closed-form change of a few weights, and the patch that undoes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.component import Component
from delible.files import atomic_folder
from delible.records import ForgetRequest

if TYPE_CHECKING:
    from delible.lm.lm import LM


@dataclass
class Patch:
    """A removable edit of weights.

    Attributes:
        factors: For each parameter (left [rows, rank], right [rank, columns]): the change is
            left @ right, in the parameter's own layout.
        before: The parameters' values before the edit, so that undoing is exact.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor]
    notes: dict[str, object] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes the patch as safetensors, atomically."""
        tensors = {f"before/{name}": value for name, value in self.before.items()}
        for name, (left, right) in self.factors.items():
            tensors |= {f"left/{name}": left, f"right/{name}": right}
        with atomic_folder(folder) as target:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                target / "patch.safetensors",
            )

    @classmethod
    def load(cls, folder: Path) -> Patch:
        """Reads what :meth:`save` wrote."""
        tensors = load_file(folder / "patch.safetensors")
        names = {name.partition("/")[2] for name in tensors}
        return cls(
            {
                name: (tensors[f"left/{name}"], tensors[f"right/{name}"])
                for name in names
                if f"left/{name}" in tensors
            },
            {name: tensors[f"before/{name}"] for name in names},
        )

    @torch.no_grad()
    def undo(self, lm: LM) -> None:
        """Puts the edited parameters back, bit by bit."""
        parameters = dict(lm.core.named_parameters())
        for name, value in self.before.items():
            parameters[name].copy_(value)
        lm.touch()


class Editor(Component):
    """A closed-form change of a few weights."""

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Edits the model in place and returns the patch that undoes it."""
        raise NotImplementedError
