"""What an MLP's activation function reads: the pre-activation, found by trying.

A plain MLP has one matrix that reads the hidden state, and what it gives is the pre-activation. A
gated one has two, act(g) * u, side by side or fused in one; the product changes its sign with u and
not with g, so each is turned round once and what the down projection then reads is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delible.errors import ModelError
from delible.lm.anatomy import Anatomy
from delible.lm.hooks import capture, steer
from delible.lm.layout import turn

#: Tokens that an MLP is tried on.
_TOKENS = 5


@dataclass(frozen=True)
class Gate:
    """Where a block's pre-activations are.

    Attributes:
        path: The module whose output holds them.
        first: The first of its columns that do.
        width: How many there are; the MLP's inner width.
    """

    path: str
    first: int
    width: int


def gate_of(core: nn.Module, anatomy: Anatomy, layer: int) -> Gate:
    """The pre-activations of a block's MLP.

    Args:
        core: The transformers model.
        anatomy: Its anatomy.
        layer: Index of the block.

    Raises:
        ModelError: The block has no single MLP (experts have many), or none whose pre-activation
            can be told apart.
    """
    ways_in, ways_out = (anatomy.parameter_names(layer, role) for role in ("mlp_in", "mlp_out"))
    block = f"{anatomy.block_path(layer)}."
    experts = anatomy.experts and any(
        name.startswith(f"{block}{anatomy.experts}") for name in ways_out
    )
    if len(ways_out) != 1 or experts:
        raise _without(core, f"single MLP in layer {layer} (experts have many)")
    inside, out = [_owner(name) for name in ways_in], _owner(ways_out[0])
    width = _widths(core, out)[0]
    parts = [
        Gate(path, first, width)
        for path in inside
        for first in range(0, _widths(core, path)[1] - width + 1, width)
    ]
    if len(parts) == 1:
        return parts[0]
    found = [part for part in parts if not _turns(core, anatomy, layer, out, part)]
    if len(found) != 1:
        raise _without(core, f"pre-activation that can be told apart in the MLP of layer {layer}")
    return found[0]


@torch.no_grad()
def _turns(core: nn.Module, anatomy: Anatomy, layer: int, out: str, part: Gate) -> bool:
    """Whether what the down projection reads changes its sign with a part."""
    mlp = core.get_submodule(anatomy.path(layer, anatomy.mlp))
    weight = next(mlp.parameters())
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1, _TOKENS, anatomy.hidden_size, generator=random).to(weight)

    def turned(given: Tensor) -> Tensor:
        new = given.clone()
        new[..., part.first : part.first + part.width] *= -1
        return new

    with turn(core), _quiet(mlp):  # nobody else asks the model meanwhile
        with capture(core, [out], which="input") as before:
            mlp(states)
        with steer(core, part.path, turned), capture(core, [out], which="input") as after:
            mlp(states)
    plain, other = before[out].float(), after[out].float()
    return bool(torch.allclose(-plain, other, atol=1e-3 * float(plain.abs().max())))


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _owner(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".base_layer")


def _widths(core: nn.Module, path: str) -> tuple[int, int]:
    """What a matrix reads and gives, whichever way round it is kept."""
    module = core.get_submodule(path)
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.get_parameter("weight")  # Conv1D keeps [in, out]
    return int(weight.shape[0]), int(weight.shape[1])


def _without(core: nn.Module, part: str) -> ModelError:
    return ModelError(f"it has no {part}.", where=type(core).__name__)
