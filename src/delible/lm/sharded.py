"""A model whose weights are spread over processes: each holds a share of every tensor (FSDP2).

What computes is gathered when it is called, block by block, and given back afterwards. One group
of tensors is the rest of the model: embedding, last norm and head. It is gathered with the
backbone and stays until the backward pass has ended, or until :meth:`Sharded.settle`, because the
head is called apart from the backbone: as often as a text needs it, which is not equally often in
all processes, and what is gathered must be gathered by all of them at once. Hence also the only
rule for whoever computes with such a model: all processes call the backbone equally often.

Weights are gathered as they are, and cast by whoever computes in a shorter precision: so answers
are those of the whole model to the last bit.

``accelerate`` says where to compute (:mod:`delible.train.processes`); its own grouping is not
used, since it gathers a head that is not tied, and adds up its gradient, at every call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from delible.errors import ModelError
from delible.lm.body import Budget

if TYPE_CHECKING:
    from delible.lm.body import Body

#: Name under which the head is shown to the group of the backbone, for as long as that is made.
_HEAD = "delible_head"


class Sharded:
    """How one model is spread over processes; made in all of them at once.

    Args:
        lm: A whole model, the same in every process; on a processor, so that an accelerator never
            holds more of it than its share and one block.
        device: Where this process computes.

    Attributes:
        form: The model as it was, without weights.
        home: Where it was.
        shares_prefix: As it was.
        parameters: By the identity of each parameter as it was: the share of it.

    Raises:
        ModelError: The model's parts lie where its groups cannot be made of them.
    """

    def __init__(self, lm: Body, device: torch.device) -> None:
        core, anatomy = lm.core, lm.anatomy
        if lm.leading is not lm or not anatomy.blocks.startswith(f"{anatomy.backbone}."):
            raise ModelError(
                "its blocks are no part of one backbone, so that its weights cannot be spread over "
                "processes.",
                where=anatomy.class_name,
                hint="Train it without FSDP: accelerate launch --multi_gpu.",
            )
        self.form, self.home = _without_weights(lm.model), lm.device
        self.shares_prefix = lm.shares_prefix
        before = dict(lm.model.named_parameters())
        self.backbone: Any = core.get_submodule(anatomy.backbone)
        head = core.get_output_embeddings()
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self.first = anatomy.block(core, 0)
        for block in range(anatomy.layers):
            fully_shard(anatomy.block(core, block), mesh=mesh, reshard_after_forward=True)
        apart = not any(head is one for one in self.backbone.modules())
        if apart:
            self.backbone.register_module(_HEAD, head)
        fully_shard(self.backbone, mesh=mesh, reshard_after_forward=False)
        if apart:
            delattr(self.backbone, _HEAD)
        after = dict(lm.model.named_parameters())
        self.parameters = {id(value): after[name] for name, value in before.items()}
        # the first call makes the groups, which must not happen in inference mode
        with lm.evaluating(), lm.computing(), torch.no_grad():
            self.backbone(input_ids=torch.full((1, 1), lm.pad_id, device=lm.device))
        self.settle()

    def settle(self) -> None:
        """Gives back what is gathered. Due before weights change or are looked at, if no backward
        pass came last: what is gathered would be taken for the weights.
        """
        self.backbone.reshard()

    def inside(self, value: Tensor, block: Any, last: Tensor) -> Tensor:
        """A value inside a block, so that a gradient may begin there.

        A block is gathered again when a gradient comes to what it gave, and gradients are added up
        at the end if one came to any. A value inside is neither.

        Args:
            block: The module.
            last: What the backbone gave.
        """
        if not value.requires_grad:
            return value
        value.register_hook(lambda _: block.unshard())
        if block is self.first:  # no block below it gives anything
            return _Joined.apply(value, last)  # type: ignore[no-any-return, no-untyped-call]
        return value

    def fill(self, lm: Body, keep: bool) -> None:
        """Gathers the weights into :attr:`form` in main memory, tensor by tensor.

        Args:
            keep: This process keeps them; others give their shares.
        """
        self.settle()
        filled: dict[int, nn.Parameter] = {}
        shares = dict(lm.model.named_parameters())
        for name, empty in self.form.named_parameters():
            share = shares[name]
            value = whole(share.detach())
            if keep:
                value = value.to("cpu", copy=value is share)
                filled[id(empty)] = nn.Parameter(value, requires_grad=share.requires_grad)
        for module in self.form.modules():
            for name, one in module._parameters.items():
                if one is not None and id(one) in filled:
                    module._parameters[name] = filled[id(one)]
        for module, other in zip(self.form.modules(), lm.model.modules(), strict=True):
            for name, buffer in other._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.cpu()


class _Joined(torch.autograd.Function):
    """The first value; its gradient goes to the second one, too, as zeros."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (other,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(other)


def _without_weights(model: nn.Module) -> Any:
    """The same modules with empty parameters (meta), those that are tied tied again."""
    empty = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for one in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


def asked_for() -> bool:
    """Whether the environment spreads models over several processes."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return asked and int(os.environ.get("WORLD_SIZE", "1")) > 1


# ---- tensors


def is_share(value: Tensor) -> bool:
    """Whether a process holds some rows of a tensor only."""
    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """All of a tensor: itself, or gathered from all processes, which all must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor) -> Tensor:
    """What this process holds of a tensor: some of its rows, or all of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def rows_of(value: Tensor) -> slice:
    """Which rows of a tensor that is spread over processes this one holds."""
    size = -(-value.shape[0] // value.device_mesh.size())  # type: ignore[attr-defined]
    start = min(size * value.device_mesh.get_local_rank(), value.shape[0])  # type: ignore[attr-defined]
    return slice(start, min(start + size, value.shape[0]))


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as another one of its shape is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def summed(value: float, *, over: Iterable[Tensor]) -> float:
    """A sum over this process's shares of tensors, as a sum over the tensors."""
    for one in over:
        if isinstance(one, DTensor):
            total = torch.tensor(value, dtype=torch.float64, device=one.device)
            torch.distributed.all_reduce(total, group=one.device_mesh.get_group())
            return float(total)
        break
    return value


def agreed(budget: Budget) -> Budget:
    """The least of what fits in any process: all of them must make the same batches."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, budget)
    return Budget(
        min(one.tokens for one in found),
        min(one.cached_tokens for one in found),
        min(one.rows for one in found),
    )


def plain_class(module: nn.Module) -> type:
    """A module's class without what FSDP put before it."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


__all__ = [
    "Sharded", "agreed", "asked_for", "is_share", "plain_class", "rows_of", "share_of", "spread",
    "summed", "whole",
]  # fmt: skip
