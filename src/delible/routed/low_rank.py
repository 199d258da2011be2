"""Low-rank products beside matrices: read off a model that wears them, kept as PEFT keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.errors import RunError
from delible.files import atomic_folder
from delible.lm.body import Body

_SETTINGS, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

#: A and B of one matrix: [rank, inner] and [outer, rank].
Pair = tuple[Float[Tensor, "rank inner"], Float[Tensor, "outer rank"]]


@dataclass(frozen=True)
class LowRank:
    """An adapter: W x becomes W x + scale B A x at some matrices.

    Attributes:
        pairs: A and B by the path of the module in the bare model, fp32 on the CPU.
        scale: alpha / rank.
    """

    pairs: Mapping[str, Pair]
    scale: float

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all of it."""
        whole = hashlib.sha256(repr(self.scale).encode())
        for path, pair in sorted(self.pairs.items()):
            for one in pair:
                whole.update(f"{path} {list(one.shape)} {one.dtype} ".encode())
                whole.update(one.contiguous().flatten().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    @property
    def rank(self) -> int:
        """Inner width of the products (the largest, where they differ)."""
        return max(len(down) for down, _ in self.pairs.values())

    def save(self, folder: Path, base: str) -> None:
        """Writes it as PEFT does, atomically.

        Args:
            base: Name of the model that it is for.
        """
        rank = self.rank
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": rank, "lora_alpha": self.scale * rank, "lora_dropout": 0.0, "bias": "none",
            "inference_mode": True, "target_modules": sorted(self.pairs),
        }  # fmt: skip
        tensors = {
            f"{_PREFIX}{path}.lora_{letter}.weight": one.contiguous()
            for path, pair in self.pairs.items()
            for letter, one in zip("AB", pair, strict=True)
        }
        with atomic_folder(folder) as target:
            (target / _SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            save_file(tensors, target / _TENSORS)

    @classmethod
    def load(cls, folder: Path) -> LowRank:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: It cannot be read.
        """
        try:
            settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            scale = float(settings["lora_alpha"]) / int(settings["r"])
            paths = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
            pairs = {
                path: (
                    tensors[f"{_PREFIX}{path}.lora_A.weight"],
                    tensors[f"{_PREFIX}{path}.lora_B.weight"],
                )
                for path in paths
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunError(
                f"the adapter cannot be read: {error}",
                where=str(folder),
                hint="Copy the whole folder of the run again.",
            ) from error
        return cls(pairs, scale)


def worn(lm: Body, name: str = "default") -> LowRank:
    """The adapter that a model wears (PEFT), read off it.

    Raises:
        RunError: It wears none of that name, or one of another kind.
    """
    pairs, scales = dict[str, Pair](), set[float]()
    for path, module in lm.core.named_modules():
        down, up = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if name in down and name in up:
            pairs[path] = (
                down[name].weight.detach().float().cpu().clone(),
                up[name].weight.detach().float().cpu().clone(),
            )
            scales.add(float(module.scaling[name]))
    if len(scales) != 1:
        raise RunError(
            f"the model wears no single low-rank adapter '{name}'.", where=type(lm.core).__name__
        )
    return LowRank(pairs, scales.pop())


__all__ = ["LowRank", "Pair", "worn"]
