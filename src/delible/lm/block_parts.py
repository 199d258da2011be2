"""The parts of one block: attention, MLP or experts, router; which matrices are ways in and out.

A matrix that reads the hidden size is a way in, one that writes it is a way out; the part that
owns a slot of the key-value cache is attention. Names only decide between parts of one shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from delible.errors import ModelError

_SAYS_QUERY_KEY_VALUE = (
    re.compile(r"q(uery)?(_|$)|(^|_)q(_|$)|wq"),
    re.compile(r"k(ey)?(_|$)|(^|_)k(_|$)|wk"),
    re.compile(r"v(alue)?(_|$)|(^|_)v(_|$)|wv"),
)


_SAYS_OUT = re.compile(r"(^|_)(o|out|down|dense|c_proj|fc2|fc_out|wo|w2|4h_to_h)(_|$)")


_SAYS_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_SAYS_MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


@dataclass(frozen=True)
class Matrix:
    """A weight that maps one width to another, wherever it is kept."""

    path: str
    parameter: str
    width_in: int
    width_out: int
    transposed: bool
    experts: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block; paths relative to the block."""

    attention: str
    attention_in: tuple[Matrix, ...]
    attention_out: Matrix
    mlp: str
    mlp_in: tuple[Matrix, ...]
    mlp_out: tuple[Matrix, ...]
    experts: str | None = None
    router: Matrix | None = None
    shared_expert: str | None = None

    def key(self) -> tuple[Any, ...]:
        return (self.attention, self.mlp, self.experts, self.attention_out.path)


def missing(model: nn.Module, part: str, found: Mapping[str, str]) -> ModelError:
    """The error that a part is not there, with what was found before."""
    known = ", ".join(f"{name} = {path}" for name, path in found.items()) or "nothing"
    hint = (
        "Its blocks are built in a way that is not known here: each needs attention, or a "
        "recurrent part in its place, and an MLP."
        if "block" in found
        else "A causal language model of transformers (AutoModelForCausalLM) is needed."
    )
    return ModelError(
        f"no {part} found; found so far: {known}.",
        where=type(model).__name__,
        hint=hint,
    )


def _linear(module: nn.Module) -> tuple[int, int, bool] | None:
    """(width in, width out, transposed) of a module that is one matrix, otherwise None."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1]), True
    if isinstance(module, nn.Embedding) or list(module.children()):
        return None
    own = dict(module.named_parameters(recurse=False))
    if set(own) <= {"weight", "bias"} and "weight" in own and own["weight"].dim() == 2:
        return int(own["weight"].shape[1]), int(own["weight"].shape[0]), False
    return None


def _matrices(module: nn.Module, path: str = "") -> Iterator[Matrix]:
    """The matrices under a module in the order of registration; adapters are not entered."""
    shape = _linear(module)
    if shape is not None:
        suffix = "base_layer.weight" if hasattr(module, "base_layer") else "weight"
        yield Matrix(path, f"{path}.{suffix}" if path else suffix, *shape)
        return
    for name, child in module.named_children():
        yield from _matrices(child, f"{path}.{name}" if path else name)


def read_block(
    model: nn.Module, block: nn.Module, hidden_size: int, found: Mapping[str, str]
) -> BlockParts:
    """The parts of one block.

    Args:
        hidden_size: Width of the residual stream.
        found: What the model's other parts are, told when one is missing.

    Raises:
        ModelError: The block has no attention or no MLP with a way in and a way out.
    """
    parts: dict[str, list[Matrix]] = {}
    loose: list[Matrix] = []
    for name, child in block.named_children():
        matrices = list(_matrices(child, name))
        if len(matrices) == 1 and matrices[0].path == name:
            loose += matrices
        elif matrices or _fused_experts(child, name, hidden_size):
            parts[name] = matrices
    attention = _find_attention(block, parts, hidden_size)
    if attention is None:
        raise missing(model, "attention in a block", {**found, "parts": ", ".join(parts)})
    ways_in, ways_out = _ways(parts.pop(attention), hidden_size)
    if not ways_in or not ways_out:
        raise missing(model, f"way in or out of '{attention}'", found)
    shared: dict[str, Any] = {
        "attention": attention,
        "attention_in": tuple(sorted(ways_in, key=_query_key_value)),
        "attention_out": ways_out[0],
    }
    candidates = []
    for name, matrices in parts.items():
        layout = _read_mlp(block.get_submodule(name), name, matrices, hidden_size)
        if layout is not None:
            candidates.append({"mlp": name, **layout})
    if candidates:
        # The larger one: a small second pair of matrices is a side path, such as an adapter's.
        return BlockParts(**shared, **max(candidates, key=lambda each: _size(each["mlp_out"])))
    ways_in, ways_out = _ways(loose, hidden_size)
    if not ways_in or not ways_out:
        raise missing(model, "MLP in a block", {**found, "attention": attention})
    return BlockParts(**shared, mlp=ways_out[0].path, mlp_in=ways_in, mlp_out=ways_out)


def _size(matrices: tuple[Matrix, ...]) -> int:
    return sum(each.width_in * each.width_out * max(each.experts, 1) for each in matrices)


def _find_attention(
    block: nn.Module, parts: Mapping[str, list[Matrix]], hidden_size: int
) -> str | None:
    """The part with a way in and a way out that knows its slot in the key-value cache.

    A recurrent part takes attention's place: it moves information between positions as well.
    """
    candidates = [name for name, matrices in parts.items() if all(_ways(matrices, hidden_size))]

    def knows_slot(name: str) -> bool:
        return any(hasattr(module, "layer_idx") for module in block.get_submodule(name).modules())

    slots = [name for name in candidates if knows_slot(name)]
    if len(slots) == 1:
        return slots[0]
    for name in slots or candidates:
        if _SAYS_ATTENTION.search(name + type(block.get_submodule(name)).__name__):
            return name
    mixing = [name for name in candidates if not _SAYS_MLP.search(name)]
    return mixing[0] if len(mixing) == 1 and len(candidates) > 1 else None


def _ways(
    matrices: list[Matrix], hidden_size: int
) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    """Matrices that read the hidden state and the one that writes it."""
    out = [each for each in matrices if each.width_out == hidden_size]
    if len(out) > 1:  # square ones: the value, query and key matrices of equal width, or the gate
        clear = [each for each in out if each.width_in != hidden_size]
        named = [each for each in out if _SAYS_OUT.search(each.name)]
        out = clear if len(clear) == 1 else named or out
    ways_out = tuple(out[-1:])
    ways_in = tuple(
        each for each in matrices if each.width_in == hidden_size and each not in ways_out
    )
    return ways_in, ways_out


def _query_key_value(matrix: Matrix) -> int:
    """Query, key, value; a stable sort keeps the order of what names none of them."""
    said = [i for i, pattern in enumerate(_SAYS_QUERY_KEY_VALUE) if pattern.match(matrix.name)]
    return said[0] if len(said) == 1 else len(_SAYS_QUERY_KEY_VALUE)


def _read_mlp(
    module: nn.Module, path: str, matrices: list[Matrix], hidden_size: int
) -> dict[str, Any] | None:
    """The parts of an MLP or of a mixture of experts, or None."""
    fused = _fused_experts(module, path, hidden_size)
    listed = [
        name
        for name, each in module.named_modules()
        if isinstance(each, nn.ModuleList) and any(True for _ in _matrices(each))
    ]
    if not fused and not listed:
        ways_in, ways_out = _ways(matrices, hidden_size)
        return {"mlp_in": ways_in, "mlp_out": ways_out} if ways_in and ways_out else None
    if fused:
        experts_path = fused[0].path
        count = fused[0].experts
        ways_in, ways_out = fused[:-1], fused[-1:]
    else:
        experts_path = f"{path}.{listed[0]}"
        experts = list(module.get_submodule(listed[0]).named_children())
        count = len(experts)
        pairs = [
            _ways(list(_matrices(expert, f"{experts_path}.{name}")), hidden_size)
            for name, expert in experts
        ]
        ways_in = tuple(chain.from_iterable(pair[0] for pair in pairs))
        ways_out = tuple(chain.from_iterable(pair[1] for pair in pairs))
    rest = [each for each in matrices if not each.path.startswith(f"{experts_path}.")]
    routers = [each for each in rest if (each.width_in, each.width_out) == (hidden_size, count)]
    shared_in, shared_out = _ways(
        [each for each in rest if each not in routers and each.width_out != 1], hidden_size
    )
    shared_path = shared_out[0].path.rpartition(".")[0] if shared_in and shared_out else None
    return {
        "mlp_in": ways_in + (shared_in if shared_path else ()),
        "mlp_out": ways_out + (shared_out if shared_path else ()),
        "experts": experts_path,
        "router": routers[0] if routers else None,
        "shared_expert": shared_path,
    }


def _fused_experts(module: nn.Module, path: str, hidden_size: int) -> tuple[Matrix, ...]:
    """Expert weights of three dimensions, the way out last; empty if there are none."""
    for name, owner in module.named_modules():
        weights = {
            each: parameter
            for each, parameter in owner.named_parameters(recurse=False)
            if parameter.dim() == 3 and hidden_size in parameter.shape[1:]
        }
        if len(weights) < 2:
            continue
        # Gate and up-projection are fused, so the way out is the smaller one; if all are of one
        # size (no gate, or gate and up apart) it is the one whose name says so.
        smallest = min(parameter.numel() for parameter in weights.values())
        small = [each for each, parameter in weights.items() if parameter.numel() == smallest]
        out = ([each for each in small if _SAYS_OUT.search(each)] or small)[-1]
        count, rows, columns = (int(size) for size in weights[out].shape)
        transposed = bool(getattr(owner, "is_transposed", False))
        if rows != columns:
            transposed = columns == hidden_size
        owner_path = f"{path}.{name}" if name else path
        matrices = []
        for each in [other for other in weights if other != out] + [out]:
            first, second = (int(size) for size in weights[each].shape[1:])
            width_in, width_out = (first, second) if transposed else (second, first)
            matrices.append(
                Matrix(owner_path, f"{owner_path}.{each}", width_in, width_out, transposed, count)
            )
        return tuple(matrices)
    return ()
