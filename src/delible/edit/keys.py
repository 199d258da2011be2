"""What a model's down-projections read and its blocks write while it reads token ids: at every
position, or at the last token of a row.

A down-projection's input is the key under which its weights keep a value; closed-form editors
change what is written at some keys, and ask for those of a name in a context (``subjects.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import ModelError, RecipeError
from delible.lm.anatomy import Anatomy, unwrapped
from delible.lm.hooks import capture, truncated

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Positions of one forward pass, padding included.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class DownProjection:
    """The matrix that writes a block's MLP output.

    Attributes:
        parameter: Its full name among ``lm.core.named_parameters()``.
        path: The module whose input is the key.
        width: Length of a key (the MLP's inner width).
        transposed: The weight is ``[width, hidden]`` (GPT-2) instead of ``[hidden, width]``.
    """

    parameter: str
    path: str
    width: int
    transposed: bool


def down_projection(lm: LM, layer: int) -> DownProjection:
    """The down-projection of a block.

    Raises:
        ModelError: There is no such block, the block is a mixture of experts, or the weight is
            packed (quantized), so that it has no rows and columns to edit.
    """
    names = lm.anatomy.mlp_out_parameters(layer)
    parameter = lm.core.get_parameter(names[0]) if len(names) == 1 else None
    if parameter is None or parameter.dim() == 3:
        raise ModelError(
            f"layer {layer} is a mixture of experts: it has no single down-projection to edit.",
            where=lm.anatomy.class_name,
            hint="Choose dense layers (layers=...) or a dense model.",
        )
    transposed = lm.anatomy.transposed
    hidden = lm.anatomy.hidden_size
    if (
        not parameter.is_floating_point()
        or parameter.dim() != 2
        or parameter.shape[1 if transposed else 0] != hidden
    ):
        raise ModelError(
            f"'{names[0]}' is {parameter.dtype} of shape {tuple(parameter.shape)}, not a plain "
            f"matrix that writes {hidden} values.",
            where=lm.anatomy.class_name,
            hint="Load the model without quantization.",
        )
    path = names[0].removesuffix(".weight").removesuffix(".base_layer")
    return DownProjection(names[0], path, int(parameter.shape[0 if transposed else 1]), transposed)


# ---- reading


@torch.no_grad()
def read_states(
    lm: LM, rows: Sequence[Sequence[int]], layers: Sequence[int], *, autocast: bool = False
) -> Iterator[tuple[list[int], dict[int, Tensor], Tensor]]:
    """Down-projection inputs and the last layer's output, batch by batch, shortest rows first.

    Only the blocks up to the highest layer run. Rows are padded on the right without a mask: in
    a causal model padding cannot reach a real position, so values do not depend on the batch.

    Args:
        rows: Token ids, each row at least one.
        layers: Indices of the blocks whose keys are read.
        autocast: Compute as the model answers (see ``LM.precision``); otherwise in the data type
            of the weights.

    Yields:
        Indices of the rows in the batch; keys by layer, each ``[batch, sequence, width]``; the
        output of the highest of the layers, ``[batch, sequence, hidden]``. Positions beyond a
        row's length are meaningless.
    """
    paths = {layer: down_projection(lm, layer).path for layer in layers}
    block = lm.anatomy.block_path(max(layers))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        size = 1
        while size < len(order) and (size + 1) * len(rows[order[size]]) <= BATCH_TOKENS:
            size += 1
        indices, order = order[:size], order[size:]
        ids = torch.full((size, len(rows[indices[-1]])), lm.pad_id)
        for place, index in enumerate(indices):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
        with (
            lm.evaluating(),
            truncated(lm.core, lm.anatomy, max(layers) + 1),
            capture(lm.core, paths.values(), which="input") as inputs,
            capture(lm.core, [block]) as outputs,
            lm.computing() if autocast else nullcontext(),
        ):
            backbone = unwrapped(lm.model).get_submodule(lm.anatomy.backbone)
            backbone(input_ids=ids.to(lm.device), use_cache=False)
        # Some families flatten batch and sequence before the MLP.
        shape = (size, ids.shape[1], -1)
        yield (
            indices,
            {layer: inputs[path].reshape(shape) for layer, path in paths.items()},
            outputs[block].reshape(shape),
        )


# ---- at the last token


def last_states(
    lm: LM, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[dict[int, Float[Tensor, "rows width"]], Float[Tensor, "rows hidden"]]:
    """Keys by layer and outputs of the highest layer at the last token of each row, in float64."""
    keys: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    outputs: dict[int, Tensor] = {}
    for indices, found, output in read_states(lm, rows, layers):
        for place, index in enumerate(indices):
            last = len(rows[index]) - 1
            outputs[index] = output[place, last].double()
            for layer in layers:
                keys[layer][index] = found[layer][place, last].double()
    order = range(len(rows))
    return (
        {layer: torch.stack([keys[layer][index] for index in order]) for layer in layers},
        torch.stack([outputs[index] for index in order]),
    )


# ---- which layers


def consecutive_layers(
    anatomy: Anatomy, first: float, last: float, layers: tuple[int, ...] | None, where: str
) -> list[int]:
    """Indices of the edited layers, ascending.

    Args:
        first, last: Relative depths of the first and the last one.
        layers: Indices, instead of depths; negative ones count from the end.
        where: Who asks, for messages.

    Raises:
        ModelError: There is no such layer.
        RecipeError: Explicit layers are not consecutive, or the last depth is above the first.
    """
    if layers is None:
        if last < first:
            raise RecipeError(
                f"'last_depth' = {last:g} is above 'first_depth' = {first:g}.", where=where
            )
        return list(range(anatomy.layer_at(first), anatomy.layer_at(last) + 1))
    for layer in layers:
        anatomy.block_path(layer)
    chosen = sorted({layer % anatomy.layers for layer in layers})
    if chosen != list(range(chosen[0], chosen[-1] + 1)):
        raise RecipeError(
            f"the layers {chosen} are not consecutive.",
            where=where,
            hint="The residual is spread from the first to the last one; leave no gap.",
        )
    return chosen
