"""Where things are in a language model: blocks, attention, MLP, experts, norm, head, embedding.

The anatomy is read off the module tree and the shapes of the weights, never off the model's name:
the blocks are the largest list of equal modules; inside a block a matrix that reads the hidden
size is a way in, one that writes it is a way out; the part that owns a slot of the key-value cache
is attention. Names only decide between parts of the same shape. :mod:`delible.lm.verify` checks it
with a forward pass: attention must move information between positions, the MLP must not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from delible.errors import ModelError, nearest

Role = Literal[
    "attention_in", "attention_out", "mlp_in", "mlp_out", "router", "attention", "mlp", "block"
]
ROLES: tuple[str, ...] = get_args(Role)

_SAYS_QUERY_KEY_VALUE = (
    re.compile(r"q(uery)?(_|$)|(^|_)q(_|$)|wq"),
    re.compile(r"k(ey)?(_|$)|(^|_)k(_|$)|wk"),
    re.compile(r"v(alue)?(_|$)|(^|_)v(_|$)|wv"),
)
_SAYS_OUT = re.compile(r"(^|_)(o|out|down|dense|c_proj|fc2|fc_out|wo|w2|4h_to_h)(_|$)")
_SAYS_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_SAYS_FINAL = re.compile(r"final|_f$|^norm|^ln")


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


@dataclass(frozen=True)
class _Matrix:
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
class _Layout:
    """The parts of one block; paths relative to the block."""

    attention: str
    attention_in: tuple[_Matrix, ...]
    attention_out: _Matrix
    mlp: str
    mlp_in: tuple[_Matrix, ...]
    mlp_out: tuple[_Matrix, ...]
    experts: str | None = None
    router: _Matrix | None = None
    shared_expert: str | None = None

    def key(self) -> tuple[Any, ...]:
        return (self.attention, self.mlp, self.experts, self.attention_out.path)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    inner: nn.Module = get_base_model() if callable(get_base_model) else model
    return inner


def derive(model: nn.Module) -> Anatomy:
    """Reads the anatomy of a causal language model off its modules; no forward pass.

    Args:
        model: A transformers model with a language-model head, with or without a PEFT adapter.

    Raises:
        ModelError: A part is missing; says the class, what was found and what was not.
    """
    model = unwrapped(model)
    found: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = _embeddings(model, names, found)
    blocks = _find_blocks(model, found)
    backbone, _, _ = blocks.rpartition(".")
    block_list = list(model.get_submodule(blocks).children())
    hidden_size = _hidden_size(model, block_list[0], embedding)
    layouts = []
    for layer, block in enumerate(block_list):
        found["block"] = f"{blocks}.{layer} ({type(block).__name__})"
        layouts.append(_read_block(model, block, hidden_size, found))
    kinds = [layout.key() for layout in layouts]
    layout = layouts[kinds.index(max(kinds, key=kinds.count))]
    has_experts = layout.experts is not None
    return Anatomy(
        class_name=type(model).__name__,
        backbone=backbone,
        blocks=blocks,
        norm=_find_norm(model.get_submodule(backbone), backbone, blocks, hidden_size),
        head=head,
        embedding=embedding,
        attention=layout.attention,
        mlp=layout.mlp,
        attention_in=tuple(matrix.path for matrix in layout.attention_in),
        attention_out=layout.attention_out.path,
        mlp_in=() if has_experts else tuple(matrix.path for matrix in layout.mlp_in),
        mlp_out=None if has_experts else layout.mlp_out[0].path,
        experts=layout.experts,
        router=layout.router.path if layout.router else None,
        shared_expert=layout.shared_expert,
        transposed=layout.attention_out.transposed,
        experts_transposed=has_experts and layout.mlp_out[0].transposed,
        tied=_weight(model.get_submodule(head)) is _weight(model.get_submodule(embedding)),
        layers=len(block_list),
        hidden_size=hidden_size,
        mixed=len(set(kinds)) > 1,
        parameters=tuple(
            _role_parameters(f"{blocks}.{layer}.", block, layout)
            for layer, (block, layout) in enumerate(zip(block_list, layouts, strict=True))
        ),
    )


def _missing(model: nn.Module, part: str, found: Mapping[str, str]) -> ModelError:
    known = ", ".join(f"{name} = {path}" for name, path in found.items()) or "nothing"
    return ModelError(
        f"no {part} found; found so far: {known}.",
        where=type(model).__name__,
        hint="A causal language model of transformers (AutoModelForCausalLM) is needed.",
    )


def _embeddings(
    model: nn.Module, names: Mapping[int, str], found: dict[str, str]
) -> tuple[str, str]:
    paths = []
    for part, getter in (
        ("head", "get_output_embeddings"),
        ("embedding", "get_input_embeddings"),
    ):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            module = None
        if module is None or id(module) not in names:
            raise _missing(model, part, found)
        found[part] = names[id(module)]
        paths.append(found[part])
    return paths[0], paths[1]


def _find_blocks(model: nn.Module, found: dict[str, str]) -> str:
    """Path of the list of equal modules with the most parameters."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if get_text_config else config
    expected = getattr(text, "num_hidden_layers", None)
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList) else []
        if not children or len({type(child) for child in children}) > 1:
            continue
        if expected is None or len(children) == expected:
            sizes[path] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes or max(sizes.values()) == 0:
        told = "" if expected is None else f" of {expected} equal modules"
        raise _missing(model, f"list of blocks (a ModuleList{told})", found)
    found["blocks"] = max(sizes, key=lambda path: sizes[path])
    return found["blocks"]


def _hidden_size(model: nn.Module, block: nn.Module, embedding: str) -> int:
    """Width of the norms of a block; without norms that have weights, of the embedding."""
    widths = [
        parameter.numel()
        for child in block.children()
        for name, parameter in child.named_parameters()
        if parameter.dim() == 1 and name == "weight" and not list(child.children())
    ]
    if widths:
        return max(set(widths), key=widths.count)
    return int(_weight(model.get_submodule(embedding)).shape[-1])


def _find_norm(backbone: nn.Module, path: str, blocks: str, hidden_size: int) -> str | None:
    candidates = []
    for name, child in backbone.named_children():
        shapes = [tuple(parameter.shape) for parameter in child.parameters()]
        is_norm = "norm" in type(child).__name__.lower()
        if (shapes and all(s == (hidden_size,) for s in shapes)) or (is_norm and not shapes):
            candidates.append(name)
    if not candidates:
        return None
    final = [name for name in candidates if _SAYS_FINAL.search(name)] or candidates
    return f"{path}.{final[-1]}" if path else final[-1]


def _weight(module: nn.Module) -> torch.Tensor:
    """The weight of a module, under an adapter too."""
    weight = getattr(module, "base_layer", module).weight
    assert isinstance(weight, torch.Tensor)  # every embedding of torch and transformers has one
    return weight


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


def _matrices(module: nn.Module, path: str = "") -> Iterator[_Matrix]:
    """The matrices under a module in the order of registration; adapters are not entered."""
    shape = _linear(module)
    if shape is not None:
        suffix = "base_layer.weight" if hasattr(module, "base_layer") else "weight"
        yield _Matrix(path, f"{path}.{suffix}" if path else suffix, *shape)
        return
    for name, child in module.named_children():
        yield from _matrices(child, f"{path}.{name}" if path else name)


def _read_block(
    model: nn.Module, block: nn.Module, hidden_size: int, found: Mapping[str, str]
) -> _Layout:
    parts: dict[str, list[_Matrix]] = {}
    loose: list[_Matrix] = []
    for name, child in block.named_children():
        matrices = list(_matrices(child, name))
        if len(matrices) == 1 and matrices[0].path == name:
            loose += matrices
        elif matrices or _fused_experts(child, name, hidden_size):
            parts[name] = matrices
    attention = _find_attention(block, parts, hidden_size)
    if attention is None:
        raise _missing(model, "attention in a block", {**found, "parts": ", ".join(parts)})
    ways_in, ways_out = _ways(parts.pop(attention), hidden_size)
    if not ways_in or not ways_out:
        raise _missing(model, f"way in or out of '{attention}'", found)
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
        return _Layout(**shared, **max(candidates, key=lambda each: _size(each["mlp_out"])))
    ways_in, ways_out = _ways(loose, hidden_size)
    if not ways_in or not ways_out:
        raise _missing(model, "MLP in a block", {**found, "attention": attention})
    return _Layout(**shared, mlp=ways_out[0].path, mlp_in=ways_in, mlp_out=ways_out)


def _size(matrices: tuple[_Matrix, ...]) -> int:
    return sum(each.width_in * each.width_out * max(each.experts, 1) for each in matrices)


def _find_attention(
    block: nn.Module, parts: Mapping[str, list[_Matrix]], hidden_size: int
) -> str | None:
    """The part with a way in and a way out that knows its slot in the key-value cache."""
    candidates = [name for name, matrices in parts.items() if all(_ways(matrices, hidden_size))]

    def knows_slot(name: str) -> bool:
        return any(hasattr(module, "layer_idx") for module in block.get_submodule(name).modules())

    slots = [name for name in candidates if knows_slot(name)]
    if len(slots) == 1:
        return slots[0]
    for name in slots or candidates:
        if _SAYS_ATTENTION.search(name + type(block.get_submodule(name)).__name__):
            return name
    return None


def _ways(
    matrices: list[_Matrix], hidden_size: int
) -> tuple[tuple[_Matrix, ...], tuple[_Matrix, ...]]:
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


def _query_key_value(matrix: _Matrix) -> int:
    """Query, key, value; a stable sort keeps the order of what names none of them."""
    said = [i for i, pattern in enumerate(_SAYS_QUERY_KEY_VALUE) if pattern.match(matrix.name)]
    return said[0] if len(said) == 1 else len(_SAYS_QUERY_KEY_VALUE)


def _read_mlp(
    module: nn.Module, path: str, matrices: list[_Matrix], hidden_size: int
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


def _fused_experts(module: nn.Module, path: str, hidden_size: int) -> tuple[_Matrix, ...]:
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
                _Matrix(owner_path, f"{owner_path}.{each}", width_in, width_out, transposed, count)
            )
        return tuple(matrices)
    return ()


def _role_parameters(
    prefix: str, block: nn.Module, layout: _Layout
) -> Mapping[str, tuple[str, ...]]:
    def full(matrices: tuple[_Matrix, ...]) -> tuple[str, ...]:
        return tuple(prefix + each.parameter for each in matrices)

    every = [name for name, _ in block.named_parameters()]
    mlp = [layout.mlp] if layout.mlp != layout.mlp_out[0].path else []
    mlp = mlp or [each.path for each in (*layout.mlp_in, *layout.mlp_out)]
    return {
        "attention_in": full(layout.attention_in),
        "attention_out": full((layout.attention_out,)),
        "mlp_in": full(layout.mlp_in),
        "mlp_out": full(layout.mlp_out),
        "router": full((layout.router,) if layout.router else ()),
        "attention": tuple(prefix + n for n in every if n.startswith(f"{layout.attention}.")),
        "mlp": tuple(prefix + n for n in every if any(n.startswith(f"{p}.") for p in mlp)),
        "block": tuple(prefix + n for n in every),
    }
