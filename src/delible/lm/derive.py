"""Reads the anatomy of a causal language model off its module tree and the shapes of its weights.

Never off the model's name: the blocks are the largest list of as many modules as the settings
say; what a block is made of is read in ``lm/block_parts.py``. :mod:`delible.lm.verify` checks the
result with a forward pass: attention must move information between positions, the MLP must not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from delible.lm.anatomy import Anatomy, unwrapped
from delible.lm.block_parts import BlockParts, Matrix, missing, read_block

_SAYS_FINAL = re.compile(r"final|_f$|^norm|^ln")


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
    blocks = _find_blocks(model, embedding, found)
    backbone, _, _ = blocks.rpartition(".")
    block_list = list(model.get_submodule(blocks).children())
    hidden_size = _hidden_size(model, block_list[0], embedding)
    layouts = []
    for layer, block in enumerate(block_list):
        found["block"] = f"{blocks}.{layer} ({type(block).__name__})"
        layouts.append(read_block(model, block, hidden_size, found))
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
            raise missing(model, part, found)
        found[part] = names[id(module)]
        paths.append(found[part])
    return paths[0], paths[1]


def _find_blocks(model: nn.Module, embedding: str, found: dict[str, str]) -> str:
    """Path of the list of modules with the most parameters, as many as the model has blocks.

    One beside the embedding, if there is one: a tower for images may have as many blocks.
    """
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if get_text_config else config
    expected = getattr(text, "num_hidden_layers", None)
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList) else []
        alike = len({type(child) for child in children}) == 1
        # blocks may be of several classes, where their number says that they are the blocks
        if len(children) == expected or (expected is None and alike):
            sizes[path] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes or max(sizes.values()) == 0:
        told = " of equal modules" if expected is None else f" of {expected} modules"
        raise missing(model, f"list of blocks (a ModuleList{told})", found)
    beside = embedding.rpartition(".")[0]
    near = {path: path.startswith(f"{beside}.") if beside else True for path in sizes}
    found["blocks"] = max(sizes, key=lambda path: (near[path], sizes[path]))
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


def _role_parameters(
    prefix: str, block: nn.Module, layout: BlockParts
) -> Mapping[str, tuple[str, ...]]:
    def full(matrices: tuple[Matrix, ...]) -> tuple[str, ...]:
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
