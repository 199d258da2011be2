"""Vectors as large as a model: products, a linear solver, and a place outside of memory.

One tensor per parameter; nothing here makes more copies than it names.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from delible.files import explain_disk

#: One tensor per parameter name.
Vector = dict[str, Tensor]


def along(start: Tensor, end: Tensor, share: float) -> Tensor:
    """start + share * (end - start), computed in fp32; exactly the start for share 0."""
    if share == 0:
        return start
    return (start.float() + share * (end.float() - start.float())).to(start.dtype)


def dot(left: Vector, right: Vector) -> float:
    """Inner product over all tensors of ``left``."""
    # accumulated in double, in pieces: no double copy of a model
    return math.fsum(
        float((value * right[name]).sum(dtype=torch.float64)) for name, value in left.items()
    )


def norm_of(vector: Vector) -> float:
    """Euclidean norm over all tensors."""
    return math.sqrt(dot(vector, vector))


def conjugate_gradient(
    product: Callable[[Vector], Vector],
    right: Vector,
    iterations: int,
    damping: float = 0.0,
    tolerance: float = 1e-6,
) -> Vector:
    """An approximate solution x of (H + damping I) x = right.

    Args:
        product: H times a vector; H symmetric. If it is not positive definite, the iteration
            ends where the curvature is first not positive.
        iterations: At most this many products.
        tolerance: Ends when the residual is this share of ``right``.
    """
    solution = {name: torch.zeros_like(value) for name, value in right.items()}
    residual = {name: value.clone() for name, value in right.items()}
    search = {name: value.clone() for name, value in right.items()}
    square = dot(residual, residual)
    enough = tolerance**2 * square
    for _ in range(iterations):
        if square <= enough or square == 0.0:
            break
        curved = product(search)
        for name, value in search.items():
            curved[name].add_(value, alpha=damping)
        curvature = dot(search, curved)
        if curvature <= 0:
            break
        length = square / curvature
        for name, value in search.items():
            solution[name].add_(value, alpha=length)
            residual[name].sub_(curved[name], alpha=length)
        before, square = square, dot(residual, residual)
        for name, value in search.items():
            value.mul_(square / before).add_(residual[name])
    return solution


class SetAside:
    """Tensors out of the way: on disk (CPU) or in main memory (accelerator), one read at a time.

    For a sum over a model that must wait while another of the same size is made, or for weights
    that come back later.
    """

    def __init__(self, values: Vector) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="delible-")
        self._shapes: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._moved: Vector = {}
        for place, name in enumerate(list(values)):
            value = values.pop(name)
            value = value if value.dtype == torch.float64 else value.float()
            self._shapes[name] = (place, value.shape, value.dtype)
            if value.device.type == "cpu":
                with explain_disk(self._path(place)):
                    value.contiguous().numpy().tofile(self._path(place))
            else:
                self._moved[name] = value.cpu()

    def _path(self, place: int) -> Path:
        return Path(self._folder.name) / f"{place}.bin"

    def pop(self, name: str, device: torch.device) -> Tensor:
        """One of the tensors, fp32 (or fp64 if it was); it is gone afterwards."""
        place, shape, dtype = self._shapes.pop(name)
        if name in self._moved:
            return self._moved.pop(name).to(device)
        path = self._path(place)
        found = torch.from_file(str(path), size=math.prod(shape), dtype=dtype).clone()
        path.unlink()
        if not self._shapes:
            self._folder.cleanup()
        return found.reshape(shape).to(device)
