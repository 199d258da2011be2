"""What was made on the way: plain data and tensors, in a folder of two files.

A stage of a run keeps its result so, and a method what the next request on the same model is to
know. What is read is what was saved, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.errors import RunError
from delible.files import atomic_folder

_DATA, _TENSORS = "data.json", "tensors.safetensors"


@dataclass(frozen=True)
class Made:
    """Plain data and tensors.

    Attributes:
        data: What JSON can hold.
        tensors: By name; must not be written to.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """One entry of the data."""
        return self.data[name]

    def plain(self) -> Self:
        """The same as if it had been saved and read: JSON's types, tensors on the CPU.

        Raises:
            TypeError: The data are more than JSON can hold.
        """
        data = json.loads(json.dumps(dict(self.data)))
        tensors = {
            name: one.detach().to("cpu", copy=True).contiguous()
            for name, one in self.tensors.items()
        }
        return type(self)(data, tensors)

    @property
    def digest(self) -> str:
        """SHA-256 over data and tensors (hexadecimal)."""
        whole = hashlib.sha256(json.dumps(dict(self.data), sort_keys=True).encode())
        for name, one in sorted(self.tensors.items()):
            value = one.detach().cpu().contiguous()
            whole.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
            whole.update(value.flatten().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes JSON and safetensors, atomically."""
        plain = self.plain()
        with atomic_folder(folder) as target:
            text = json.dumps(plain.data, indent=2, ensure_ascii=False)
            (target / _DATA).write_text(text, encoding="utf-8")
            save_file(dict(plain.tensors), target / _TENSORS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: It is missing or damaged.
        """
        try:
            data = json.loads((folder / _DATA).read_text(encoding="utf-8"))
            return cls(data, load_file(folder / _TENSORS))
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(
                f"what an earlier stage or request left here cannot be read ({error}).",
                where=str(folder),
                hint="Restore the folder, or delete the run and start it again.",
            ) from error


def remembered(system: Any) -> Made | None:
    """What the method that made a system left for the next request; None: nothing."""
    found: Made | None = getattr(system, "remembers", None)
    return found


__all__ = ["Made", "remembered"]
