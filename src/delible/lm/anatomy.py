"""Where things are in a language model: blocks, attention, MLP, experts, norm, head, embedding.

Paths and names only, for one model; ``lm/derive.py`` reads them off the model's own modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from delible.errors import ModelError, nearest

Role = Literal[
    "attention_in", "attention_out", "mlp_in", "mlp_out", "router", "attention", "mlp", "block"
]
ROLES: tuple[str, ...] = get_args(Role)


def spread(last: int, count: int | None) -> list[int]:
    """``count`` block indices, evenly spread over 0…last and ending at last; None: all."""
    if count is None or count > last:
        return list(range(last + 1))
    return [(last + 1) * place // count - 1 for place in range(1, count + 1)]


@dataclass(frozen=True)
class Anatomy:
    """Paths of the parts of a causal language model.

    The paths serve ``model.get_submodule``; those under *relative to a block* follow
    ``f"{blocks}.{layer}."``. For a model that wears a PEFT adapter they are paths of
    ``model.get_base_model()``.

    Attributes:
        class_name: Class of the model.
        backbone: The module whose ``last_hidden_state`` is the input of the head.
        blocks: The list of blocks.
        norm: The norm after the last block, if there is one.
        head: The output embedding: hidden states to logits.
        embedding: The input embedding.
        attention: *Relative to a block.* The attention module.
        mlp: *Relative to a block.* The module whose output the MLP adds to the residual stream. A
            family without an MLP module (OPT) names its output matrix, which has the same output.
        attention_in: *Relative to a block.* The matrices that read the hidden state: query, key
            and value, or one fused matrix.
        attention_out: *Relative to a block.* The matrix that writes the hidden state.
        mlp_in: *Relative to a block.* The matrices that read the hidden state; empty for a
            mixture of experts, see :meth:`mlp_in_parameters`.
        mlp_out: *Relative to a block.* The matrix that writes the hidden state; ``None`` for a
            mixture of experts, see :meth:`mlp_out_parameters`.
        experts: *Relative to a block.* The module that holds the experts of a mixture.
        router: *Relative to a block.* The module that chooses experts.
        shared_expert: *Relative to a block.* The expert that every token passes through.
        transposed: Weights are ``[in, out]`` (``Conv1D`` of GPT-2) instead of ``[out, in]``.
        experts_transposed: Fused expert weights are ``[expert, in, out]`` instead of
            ``[expert, out, in]``.
        tied: Head and embedding are one parameter.
        layers: Number of blocks.
        hidden_size: Width of the residual stream.
        mixed: Blocks differ (dense ones between mixtures); the relative paths are then those of
            the most common kind and :meth:`parameter_names` knows each block.
    """

    class_name: str
    backbone: str
    blocks: str
    norm: str | None
    head: str
    embedding: str
    attention: str
    mlp: str
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str | None
    experts: str | None
    router: str | None
    shared_expert: str | None
    transposed: bool
    experts_transposed: bool
    tied: bool
    layers: int
    hidden_size: int
    mixed: bool
    parameters: tuple[Mapping[str, tuple[str, ...]], ...] = field(repr=False, hash=False)

    def layer_at(self, depth: float) -> int:
        """Index of the block at a relative depth: 0 is the first, 1 the last, halves round up.

        Raises:
            ModelError: A depth outside 0…1.
        """
        if not 0 <= depth <= 1:
            raise ModelError(
                f"depth {depth} is outside 0…1.",
                hint="0 is the first block, 1 the last one; give layer indices as integers.",
            )
        return math.floor(depth * (self.layers - 1) + 0.5)

    def around(self, layer: int, count: int) -> list[int]:
        """So many consecutive layers with this one in their middle, as far as there are such."""
        first = min(max(0, layer - count // 2), max(0, self.layers - count))
        return list(range(first, min(first + count, self.layers)))

    def block_path(self, layer: int) -> str:
        """Path of a block; a negative index counts from the end.

        Raises:
            ModelError: There is no such block.
        """
        if not -self.layers <= layer < self.layers:
            raise ModelError(
                f"there is no layer {layer}.",
                where=self.class_name,
                hint=f"It has {self.layers}: 0 to {self.layers - 1}.",
            )
        return f"{self.blocks}.{layer % self.layers}"

    def path(self, layer: int, part: str) -> str:
        """Full path of a relative one: ``path(3, anatomy.attention)``."""
        return f"{self.block_path(layer)}.{part}"

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """The block of a model with this anatomy."""
        return unwrapped(model).get_submodule(self.block_path(layer))

    def parameter_names(self, layer: int, role: Role) -> tuple[str, ...]:
        """Full names of the parameters that play a role in a block.

        Args:
            layer: Index of the block; a negative one counts from the end.
            role: ``attention_in``, ``attention_out``, ``mlp_in``, ``mlp_out`` and ``router`` name
                weight matrices only (of all experts, shared ones included; fused experts have
                three dimensions); ``attention``, ``mlp`` and ``block`` name every parameter.

        Raises:
            ModelError: There is no such block or role.
        """
        if role not in ROLES:
            raise ModelError(f"unknown role '{role}'.", hint=nearest(role, ROLES))
        self.block_path(layer)
        return self.parameters[layer].get(role, ())

    def mlp_in_parameters(self, layer: int) -> tuple[str, ...]:
        """Names of the weights that read the hidden state in a block's MLP or experts."""
        return self.parameter_names(layer, "mlp_in")

    def mlp_out_parameters(self, layer: int) -> tuple[str, ...]:
        """Names of the weights that write the hidden state in a block's MLP or experts."""
        return self.parameter_names(layer, "mlp_out")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    inner: nn.Module = get_base_model() if callable(get_base_model) else model
    return inner
