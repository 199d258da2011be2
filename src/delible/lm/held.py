"""What is frozen may be short: a model's weights held in bf16, or in 8 or 4 bits.

Parameters are converted one by one, so that no second model is ever in memory. Buffers (rotary
frequencies) stay as they are, as they do when transformers loads a model in bf16. In 8 and 4 bits
the linear layers of the blocks are packed (torchao), the rest is bf16.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from delible.errors import ModelError
from delible.lm.sharded import is_share, share_of
from delible.precision import BasePrecision

logger = logging.getLogger(__name__)

#: Attribute of a model whose blocks are packed: in which precision.
_PACKED = "delible_packed"
#: Weights that share a scale, with 4 bits.
GROUP = 32


def held_in(core: nn.Module) -> BasePrecision | None:
    """The precision that a model's weights are held in; None for another one (fp16)."""
    packed: BasePrecision | None = getattr(core, _PACKED, None)
    if packed is not None and any(is_packed(one) for one in core.parameters()):
        return packed
    table: Any = core.get_input_embeddings()  # type: ignore[operator]
    kinds: dict[torch.dtype, BasePrecision] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
    }
    return kinds.get(table.weight.dtype)


def is_packed(value: Tensor) -> bool:
    """Whether a tensor is several numbers in one, with scales beside them."""
    return is_traceable_wrapper_subclass(value) and not is_share(value)


def pieces(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or numbers and scales; of a tensor that
    is spread over processes what is here.
    """
    value = share_of(value)
    if not is_packed(value):
        return [value]
    names = value.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return [piece for name in names for piece in pieces(getattr(value, name))]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    every = [*model.parameters(), *model.buffers()]
    return sum(one.numel() * one.element_size() for value in every for one in pieces(value))


@torch.no_grad()
def hold(core: nn.Module, anatomy: Any, precision: BasePrecision) -> None:
    """Holds a plain model's weights in a shorter precision, in place.

    Raises:
        ModelError: What packs weights is not installed, or the model's are packed already.
    """
    now = held_in(core)
    if precision in ("float32", now):
        return
    if now in ("int8", "int4"):
        raise ModelError(
            f"the weights are held in {now} already, and are not converted to {precision}.",
            hint="Load the model again.",
        )
    for parameter in core.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    core.config.dtype = torch.bfloat16  # type: ignore[union-attr]
    if precision != "bfloat16" and not next(core.parameters()).is_meta:
        _pack(core, anatomy, precision)


def _pack(core: nn.Module, anatomy: Any, precision: BasePrecision) -> None:
    check_packing(precision)
    try:
        from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        config = Int8WeightOnlyConfig() if precision == "int8" else Int4WeightOnlyConfig(GROUP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in range(anatomy.layers):
                quantize_(core.get_submodule(anatomy.block_path(block)), config)
    except (ImportError, ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"torchao cannot hold these weights in {precision} here: "
            f"{' '.join(str(error).split())[:200]}.",
            hint="Choose --base-precision bfloat16, or int8.",
        ) from error
    setattr(core, _PACKED, precision)
    if not any(map(is_packed, core.parameters())):
        logger.warning(
            f"No matrix of this model can be packed in {precision}: its weights are held in bf16."
        )


def check_packing(precision: BasePrecision) -> None:
    """Refuses 8 and 4 bits where nothing can pack weights.

    Raises:
        ModelError: With what to install.
    """
    if precision in ("int8", "int4") and importlib.util.find_spec("torchao") is None:
        raise ModelError(
            f"weights in {precision} need torchao, which is not installed.",
            hint="Run: pip install torchao. Or choose --base-precision bfloat16.",
        )


def held_bytes(model: nn.Module, core: nn.Module, anatomy: Any, precision: BasePrecision) -> int:
    """Bytes of a model's tensors, packed layers as large as they will be, or as they are.

    Args:
        model: With its adapter.
        core: Without.
        precision: ``int8`` or ``int4`` for a model that is not packed yet.
    """
    total = weight_bytes(model)
    if precision not in ("int8", "int4"):
        return total
    for block in range(anatomy.layers):
        for module in core.get_submodule(anatomy.block_path(block)).modules():
            # adapters are fp32, and stay so
            if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
                if is_packed(module.weight):
                    continue
                weight = module.weight
                total += packed_bytes(weight.shape[0], weight.shape[1], precision)
                total -= weight.numel() * weight.element_size()
    return total


def packed_bytes(rows: int, columns: int, precision: BasePrecision) -> int:
    """Bytes of a packed matrix.

    In 8 bits a row has a scale in fp32 and a zero point of one byte; in 4 bits each group of
    :data:`GROUP` weights has both in bf16.
    """
    if precision == "int8":
        return rows * columns + 5 * rows
    return rows * columns // 2 + 4 * rows * -(-columns // GROUP)
