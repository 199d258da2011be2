"""Checkpoints: what moves, the optimiser and what components remember, in safetensors and JSON.

A resumed run continues to the same bits that it would have reached. Where a model is spread over
processes, each writes its own rows of every tensor (``trainable-00001-of-00002.safetensors``), and
reads those that it has when the run goes on: with as many processes, with others, or with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from delible.errors import RunError
from delible.files import atomic_folder
from delible.lm.sharded import is_share, rows_of, share_of
from delible.train.losses import Memory
from delible.train.optimizers import places, plain, put_together
from delible.train.processes import gathered


def save(
    folder: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    memory: Memory | None = None,
) -> None:
    """Writes a checkpoint in place of the last one, atomically.

    Where parameters are spread over processes, all of them call it.
    """
    moments = {
        f"{part}/{name}": one
        for name, parameter in parameters.items()
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items()
        for part, one in plain(key, value)
    }
    kept = {
        f"{what}/{index}": value
        for what, values in (memory or {}).items()
        for index, value in enumerate(values)
    }
    together = any(map(is_share, parameters.values()))
    number = torch.distributed.get_rank() if together else 0
    count = torch.distributed.get_world_size() if together else 1
    with _folder_of(folder, number, count) as target:
        piece = f"-{number + 1:05d}-of-{count:05d}" if together else ""
        for kind, values in (("trainable", parameters), ("optimizer", moments), ("memory", kept)):
            mine = {
                name: share_of(value.detach()).contiguous()
                for name, value in values.items()
                if is_share(value) or number == 0
            }
            if mine or (kind == "optimizer" and optimizer is not None and number == 0):
                save_file(mine, target / f"{kind}{piece}.safetensors")
        if number == 0:
            (target / "state.json").write_text(json.dumps(state), encoding="utf-8")


@contextmanager
def _folder_of(folder: Path, number: int, count: int) -> Iterator[Path]:
    """An atomic folder that ``count`` processes write; if one of them cannot, it is not written.

    Raises:
        RunError: Another process could not write its part.
    """
    if count == 1:
        with atomic_folder(folder) as target:
            yield target
        return
    with atomic_folder(folder) if number == 0 else nullcontext() as first:
        target, error = Path(gathered([str(first)], count)[0]), None
        try:
            yield target
        except Exception as found:
            error = found
        _check_all(error, count)
    gathered([None], count)  # the folder is in its place


def _check_all(error: Exception | None, count: int) -> None:
    told = [one for one in gathered([None if error is None else str(error)], count) if one]
    if error is not None:
        raise error
    if told:
        raise RunError(f"another process could not write its part of a checkpoint: {told[0]}")


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


class _Pieces:
    """Tensors whose rows lie in several files, one after the other; or in one.

    Args:
        kind: How the files' names begin.

    Raises:
        RunError: Some of the files are missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        paths = sorted(folder.glob(f"{kind}*.safetensors"))
        if paths and "-of-" in paths[0].name:
            count = int(paths[0].stem.rpartition("-")[2])
            if len(paths) != count:
                raise RunError(
                    f"the checkpoint has {len(paths)} of {count} files '{kind}'.",
                    where=str(folder),
                    hint="All processes must see the same folder; or delete it to begin anew.",
                )
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.where: dict[str, list[Any]] = {}
        for file in self.files:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                self.where.setdefault(name, []).append(file)

    def shape(self, name: str) -> torch.Size:
        shapes = [file.get_slice(name).get_shape() for file in self.where[name]]
        if not shapes[0]:
            return torch.Size()
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        files = self.where[name]
        if rows is None and len(files) == 1:
            return files[0].get_tensor(name).clone()  # type: ignore[no-any-return]
        start, stop = (0, self.shape(name)[0]) if rows is None else (rows.start, rows.stop)
        found, first = [], 0
        for file in files:
            part = file.get_slice(name)
            height = part.get_shape()[0]
            low, high = max(start - first, 0), min(stop - first, height)
            if low < high:
                found.append(part[low:high])
            elif not found:
                found.append(part[:0])
            first += height
        return torch.cat(found)

    def fill(self, name: str, target: Tensor) -> None:
        """Reads into a tensor, or into this process's share of it."""
        rows = rows_of(target) if is_share(target) else None
        share_of(target).copy_(self.read(name, rows))


@torch.no_grad()
def read_memory(
    folder: Path, device: torch.device, parameters: Sequence[torch.nn.Parameter] = ()
) -> Memory:
    """The tensors that components kept; empty if they kept none.

    Args:
        parameters: What moves. Lists that have a tensor like each of them are spread over
            processes as those are.
    """
    pieces = _Pieces(folder, "memory")
    names: dict[str, list[str]] = {}
    for joined in sorted(pieces.where, key=lambda name: int(name.rpartition("/")[2])):
        names.setdefault(joined.rpartition("/")[0], []).append(joined)
    memory: Memory = {}
    shapes = [one.shape for one in parameters]
    for what, every in names.items():
        if any(map(is_share, parameters)) and [pieces.shape(one) for one in every] == shapes:
            memory[what] = [torch.empty_like(one).detach() for one in parameters]
            for name, value in zip(every, memory[what], strict=True):
                pieces.fill(name, value)
        else:
            memory[what] = [pieces.read(one).to(device) for one in every]
    return memory


@torch.no_grad()
def restore(
    folder: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Puts weights (and the optimiser's moments) back.

    Raises:
        RunError: The checkpoint belongs to other parameters, or some of its files are missing.
    """
    weights = _Pieces(folder, "trainable")
    if set(weights.where) != set(parameters) or any(
        weights.shape(name) != value.shape for name, value in parameters.items()
    ):
        raise RunError(
            "the checkpoint was made with other trainable parameters.",
            where=str(folder),
            hint="Choose another --out folder, or delete this one.",
        )
    for name, value in parameters.items():
        weights.fill(name, value)
    if optimizer is None:
        return
    where = places(optimizer)
    moments = _Pieces(folder, "optimizer")
    found: dict[str, dict[str, Tensor]] = {}
    for joined in moments.where:
        key, _, name = joined.partition("/")
        parameter = parameters[name]
        count, home = where[id(parameter)]
        if is_share(parameter) and moments.shape(joined) == parameter.shape:
            part = torch.empty_like(parameter).detach()
            moments.fill(joined, part)
        else:
            part = moments.read(joined).to(count if key == "step" else home)
        found.setdefault(name, {})[key] = part
    for name, state in found.items():
        optimizer.state[parameters[name]].update(put_together(state))
