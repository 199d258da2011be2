"""Which coordinates gradients are looked at in, for models whose gradient does not fit.

Some blocks, the head alone (no backward pass through the blocks), or low-rank factors beside
every linear layer, whose gradients are random projections with the same inner products on
average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.train.randomness import generator

Where = Literal["all", "layers", "head", "lora"]


@dataclass(frozen=True)
class Space:
    """Which coordinates gradients are looked at in.

    Attributes:
        where: ``all`` parameters; all parameters of the blocks in ``layers``; the ``head`` (the
            output matrix and the norm before it); or ``lora``: for every linear layer of the
            blocks its gradient G [out, in] times a fixed random matrix [in, rank], as low-rank
            factors that start at zero would see it.
        layers: Block indices; negative ones count from the end.
        rank: Width of the random matrices; inner products have a relative spread of about
            1 / sqrt(rank x number of linear layers).
        seed: Of the random matrices.
    """

    where: Where = "all"
    layers: tuple[int, ...] = (-1,)
    rank: int = 8
    seed: int = 0


def parameters_in(lm: LM, space: Space) -> dict[str, nn.Parameter]:
    """The model's own floating-point parameters in a space by name (tied ones once).

    Raises:
        RecipeError: A space of blocks that names none.
    """
    elsewhere = lm.other_parts
    found = {
        name: value
        for name, value in lm.model.named_parameters()
        if value.is_floating_point() and id(value) not in elsewhere
    }
    if space.where == "all":
        return found
    wanted = {id(value) for value in _chosen(lm, space)}
    return {name: value for name, value in found.items() if id(value) in wanted}


def _chosen(lm: LM, space: Space) -> Iterator[nn.Parameter]:
    core, anatomy = lm.core, lm.anatomy
    if space.where == "layers":
        if not space.layers:
            raise RecipeError("no layers to take gradients of.", hint="Name one, such as -1.")
        for layer in space.layers:
            yield from anatomy.block(core, layer).parameters()
        return
    yield from core.get_submodule(anatomy.head).parameters()
    if anatomy.norm is not None:
        yield from core.get_submodule(anatomy.norm).parameters()


def linear_layers(lm: LM) -> list[tuple[str, Any]]:
    """Path and module of every linear layer inside the blocks, in the order of the modules."""
    return [
        (path, module)
        for path, module in lm.core.named_modules()
        if path.startswith(f"{lm.anatomy.blocks}.") and isinstance(module, (nn.Linear, Conv1D))
    ]


class Factors(nn.Module):
    """Zero matrices [out, rank] beside every linear layer, fed by fixed random projections."""

    def __init__(self, lm: LM, space: Space) -> None:
        super().__init__()
        self._layers = linear_layers(lm)
        self._projections: list[Tensor] = []
        for path, module in self._layers:
            wide, out = module.weight.shape[::-1]
            if isinstance(module, Conv1D):  # keeps its matrix as [in, out]
                wide, out = out, wide
            random = generator(space.seed, "gradients.lora", path)
            drawn = torch.randn(space.rank, wide, generator=random) / space.rank**0.5
            device = module.weight.device
            self._projections.append(drawn.to(device))
            self.register_parameter(
                self._name(path), nn.Parameter(torch.zeros(out, space.rank, device=device))
            )

    @staticmethod
    def _name(path: str) -> str:
        return path.replace(".", "/")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the products are added to the layers' outputs."""
        with ExitStack() as stack:
            for (path, module), projection in zip(self._layers, self._projections, strict=True):
                hook = module.register_forward_hook(self._adding(self._name(path), projection))
                stack.callback(hook.remove)
            yield

    def _adding(self, name: str, projection: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = arguments[0].to(projection.dtype) @ projection.T
            return output + (inner @ getattr(self, name).T).to(output.dtype)

        return hook
