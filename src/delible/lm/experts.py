"""Mixtures of experts: which weights an expert has, and how routers send tokens to experts.

Current versions of transformers keep all experts of a block in one tensor each way
([expert, out, in]); older ones have a module per expert. Both are told apart by shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delible.errors import ModelError
from delible.lm.anatomy import Anatomy
from delible.lm.identity import only_reads


@dataclass(frozen=True)
class Mixture:
    """The experts of one block. Names are full names of parameters.

    Attributes:
        layer: Index of the block.
        experts: How many there are; shared ones, which every token passes, are none of them.
        router: Parameters of the router.
        stacked: Tensors whose first dimension runs over the experts.
        single: For each expert its own parameters, where experts are modules.
    """

    layer: int
    experts: int
    router: tuple[str, ...]
    stacked: tuple[str, ...]
    single: tuple[tuple[str, ...], ...]

    def parameters(self, expert: int) -> tuple[str, ...]:
        """Names of tensors that hold an expert's weights, perhaps among others'."""
        return (*self.stacked, *(self.single[expert] if self.single else ()))


def mixtures(core: nn.Module, anatomy: Anatomy) -> dict[int, Mixture]:
    """The mixtures of a model by layer; dense blocks have none.

    Raises:
        ModelError: The model has no experts, or no router that could be read.
    """
    sizes = {name: value.shape for name, value in core.named_parameters()}
    found: dict[int, Mixture] = {}
    for layer in range(anatomy.layers):
        weights = anatomy.parameter_names(layer, "router")
        inside = _experts_begin(anatomy, layer)
        if not weights or inside is None:
            continue
        own = [name for name in sizes if name.startswith(inside)]
        count, prefix = int(sizes[weights[0]][0]), f"{weights[0].rpartition('.')[0]}."
        stacked = tuple(name for name in own if "." not in name[len(inside) :])
        single = tuple(
            tuple(name for name in own if name.startswith(f"{inside}{expert}."))
            for expert in range(count)
        )
        if all(sizes[name][0] == count for name in stacked) and (stacked or all(single)):
            router = tuple(name for name in sizes if name.startswith(prefix))
            found[layer] = Mixture(layer, count, router, stacked, single if all(single) else ())
    if found:
        return found
    if not any(anatomy.parameter_names(layer, "router") for layer in range(anatomy.layers)):
        raise ModelError(
            "the model is dense: it has no experts.",
            where=anatomy.class_name,
            hint="Give a mixture of experts (such as Mixtral, Qwen-MoE, or 'moe'), or choose "
            "another method.",
        )
    raise ModelError(
        "it has experts, and none of its blocks keeps them in a way that is known here.",
        where=anatomy.class_name,
        hint="Choose a method that does not look at experts.",
    )


def _experts_begin(anatomy: Anatomy, layer: int) -> str | None:
    """What the names of a block's experts begin with, from the first that writes; None: nothing."""
    names, block = anatomy.mlp_out_parameters(layer), f"{anatomy.block_path(layer)}."
    if not names:
        return None
    inside = names[0].removeprefix(block)
    listed = re.match(r"(.+?\.)0\.", inside)  # a module per expert
    return f"{block}{listed.group(1) if listed else inside.rpartition('.')[0] + '.'}"


def router_path(anatomy: Anatomy, layer: int) -> str:
    """Path of a block's router.

    Raises:
        ModelError: The block has none.
    """
    names = anatomy.parameter_names(layer, "router")
    if not names:
        raise ModelError(f"layer {layer} has no router.", where=anatomy.class_name)
    return names[0].removesuffix(".weight").removesuffix(".base_layer")


@contextmanager
def routing(
    core: nn.Module, anatomy: Anatomy, layers: Sequence[int], top: int | None
) -> Iterator[Mapping[int, Float[Tensor, "tokens experts"]]]:
    """Collects what routers give: by layer each expert's weight for each token, 0 if not chosen.

    Args:
        top: How many experts a token has, for routers that only give logits.

    Yields:
        Filled by a forward pass; batch and sequence are one dimension.
    """
    seen: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            seen[layer] = gates(output, top, router_path(anatomy, layer))

        return only_reads(hook)

    with ExitStack() as stack:
        for layer in layers:
            router = core.get_submodule(router_path(anatomy, layer))
            stack.callback(router.register_forward_hook(hook_of(layer)).remove)
        yield seen


def gates(output: Any, top: int | None, where: str) -> Float[Tensor, "tokens experts"]:
    """Each expert's weight for each token from what a router gives, fp32.

    Routers give logits, the weights of the chosen experts and which they are; one that gives
    logits alone has the softmax of all, cut to the largest, as it is.

    Raises:
        ModelError: It gives something else.
    """
    parts = [one for one in (output if isinstance(output, tuple | list) else (output,))
             if torch.is_tensor(one)]  # fmt: skip
    logits = parts[0].flatten(0, -2) if parts else None
    chosen = next((one for one in parts[1:] if not one.is_floating_point()), None)
    if logits is not None and chosen is not None:
        chosen = chosen.flatten(0, -2)
        weights = next((one.flatten(0, -2) for one in parts[1:] if one.is_floating_point()), None)
        if weights is not None and weights.shape == chosen.shape:
            empty = torch.zeros(logits.shape, device=logits.device)
            return empty.scatter(1, chosen, weights.float())
    if logits is not None and chosen is None and top is not None and len(parts) == 1:
        shares = logits.float().softmax(dim=1)
        largest = shares.topk(top, dim=1)
        return torch.zeros_like(shares).scatter(1, largest.indices, largest.values)
    raise ModelError(
        "what the router gives is not known here: neither logits, nor logits with the chosen "
        "experts and their weights.",
        where=where,
    )
