"""Checkpoints: what moves, the optimiser and what components remember, in safetensors and JSON.

A resumed run continues to the same bits that it would have reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from delible.errors import RunError
from delible.files import atomic_folder
from delible.train.losses import Memory
from delible.train.optimizers import places, plain, put_together


def save(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    memory: Memory | None = None,
) -> None:
    """Writes a checkpoint in place of the last one, atomically."""
    with atomic_folder(folder) as target:
        weights = {name: value.detach().contiguous() for name, value in parameters.items()}
        save_file(weights, target / "trainable.safetensors")
        if optimizer is not None:
            moments: dict[str, torch.Tensor] = {}
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    moments.update({f"{part}/{name}": one for part, one in plain(key, value)})
            save_file(moments, target / "optimizer.safetensors")
        if memory:
            kept = {
                f"{what}/{index}": value.detach().contiguous()
                for what, values in memory.items()
                for index, value in enumerate(values)
            }
            save_file(kept, target / "memory.safetensors")
        (target / "state.json").write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state of a checkpoint; None if there is no checkpoint."""
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise RunError(
            "the checkpoint cannot be read.", where=str(path), hint="Delete the folder."
        ) from None


def read_memory(folder: Path, device: torch.device) -> Memory:
    """The tensors that components kept; empty if they kept none."""
    path = folder / "memory.safetensors"
    found = load_file(path) if path.exists() else {}
    memory: Memory = {}
    for joined in sorted(found, key=lambda name: int(name.rpartition("/")[2])):
        memory.setdefault(joined.rpartition("/")[0], []).append(found[joined].to(device, copy=True))
    return memory


@torch.no_grad()
def restore(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Puts weights (and the optimiser's moments) back.

    Raises:
        RunError: The checkpoint belongs to other parameters.
    """
    weights = load_file(folder / "trainable.safetensors")
    if set(weights) != set(parameters) or any(
        weights[name].shape != value.shape for name, value in parameters.items()
    ):
        raise RunError(
            "the checkpoint was made with other trainable parameters.",
            where=str(folder),
            hint="Choose another --out folder, or delete this one.",
        )
    for name, value in parameters.items():
        value.copy_(weights[name])
    if optimizer is None:
        return
    where = places(optimizer)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key_of_name, value in load_file(folder / "optimizer.safetensors").items():
        key, _, name = key_of_name.partition("/")
        count, moments = where[id(parameters[name])]
        found.setdefault(name, {})[key] = value.to(count if key == "step" else moments)
    for name, pieces in found.items():
        optimizer.state[parameters[name]].update(put_together(pieces))
