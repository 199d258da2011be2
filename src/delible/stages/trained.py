"""What a training stage changed in a model: kept as tensors, and put back bit by bit.

Weights that differ are found by their digests, so any recipe can be a stage: one that moves all
weights, an adapter, or an adapter on weights that it moved as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.files import atomic_folder, read_json, write_json
from delible.lm.lm import LM
from delible.train.engine import TrainResult
from delible.train.recipe import Recipe

_WEIGHTS, _ADAPTER, _TOLD = "weights.safetensors", "adapter", "trained.json"
#: Between a module and the matrix below an adapter.
_BELOW = "base_layer"
#: Tensors whose numbers are their own; others are packed by a library.
PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Trained:
    """What a training stage made.

    Attributes:
        lm: The model, changed.
        history: Numbers of every step.
        notes: What components had to say.
    """

    lm: LM
    history: list[dict[str, float]]
    steps: int
    tokens: int
    stopped: str | None
    notes: dict[str, Any] = field(default_factory=dict)


def weights_below(lm: LM) -> dict[str, Tensor]:
    """A model's parameters and buffers by their names without adapters; those of adapters not."""
    adapted = [name for name, module in lm.core.named_modules() if hasattr(module, _BELOW)]
    found = {}
    for name, value in lm.core.state_dict(keep_vars=True).items():
        if type(value) not in PLAIN:  # packed weights, which do not move
            continue
        inside = next((one for one in adapted if name.startswith(f"{one}.")), None)
        if inside is None:
            found[name] = value
        elif name.startswith(f"{inside}.{_BELOW}."):
            found[name.replace(f"{inside}.{_BELOW}.", f"{inside}.")] = value
    return found


def digests(lm: LM) -> dict[str, str]:
    """SHA-256 of every parameter and buffer without adapters."""
    return {name: _digest(value) for name, value in weights_below(lm).items()}


def _digest(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    told = f"{list(value.shape)} {value.dtype} ".encode()
    return hashlib.sha256(told + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def write(result: TrainResult, before: Mapping[str, str], folder: Path) -> dict[str, int]:
    """Writes what is not as it was before: weights, an adapter, and what the steps told.

    Returns:
        How many tensors changed, and whether there is an adapter.
    """
    lm = result.lm
    changed = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in weights_below(lm).items()
        if before.get(name) != _digest(value)
    }
    told = {
        "history": result.history, "steps": result.steps, "tokens": result.tokens,
        "stopped": result.stopped, "notes": result.notes, "adapter": lm.wears_adapter,
    }  # fmt: skip
    with atomic_folder(folder) as target:
        save_file(changed, target / _WEIGHTS)
        if lm.wears_adapter:
            lm.model.save_pretrained(target / _ADAPTER, safe_serialization=True)
        write_json(target / _TOLD, told)
    return {"tensors": len(changed), "adapter": int(lm.wears_adapter)}


def read(lm: LM, recipe: Recipe, folder: Path) -> Trained:
    """Puts a model, as it was before the stage, where the stage had left it.

    Raises:
        RunError: The result is missing or damaged.
        ModelError: It belongs to another model.
    """
    told = read_json(folder / _TOLD)
    if lm.wears_adapter:
        lm.merge_adapter()  # as the trainer does before it begins
    lm.hold(recipe.training.base_precision)
    recipe.generate.prepare(lm)
    here = weights_below(lm)
    with torch.no_grad():
        for name, value in load_file(folder / _WEIGHTS).items():
            one = here[name]
            if one.dtype != value.dtype or one.shape != value.shape:
                one.data = value.to(one.device)
            else:
                one.copy_(value)
    lm.touch()
    if told["adapter"]:
        lm.put_on(folder / _ADAPTER)
    lm.model.eval()
    lm.precision = lm.resolved(recipe.training.precision)
    return Trained(
        lm, told["history"], told["steps"], told["tokens"], told["stopped"], told["notes"]
    )


__all__ = ["Trained", "digests", "read", "weights_below", "write"]
