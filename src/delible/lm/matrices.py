"""The matrices of a model's blocks: what is rounded when it is quantized, and cut when pruned."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delible.lm.anatomy import Role
from delible.lm.lm import LM

MATRICES: tuple[Role, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def linear_weights(lm: LM) -> dict[str, Tensor]:
    """Weights of the linear layers of the blocks by name, output channels as rows.

    The tensors are views: of shape [out, in], or [expert, out, in] where a mixture keeps its
    experts in one tensor. Routers are left out.
    """
    anatomy, core = lm.anatomy, lm.core
    found: dict[str, Tensor] = {}
    for layer in range(anatomy.layers):
        routers = anatomy.parameter_names(layer, "router")
        named = {name for role in MATRICES for name in anatomy.parameter_names(layer, role)}
        for name in anatomy.parameter_names(layer, "block"):
            path, _, own = name.rpartition(".")
            owner, weight = core.get_submodule(path), core.get_parameter(name).detach()
            # Some attentions chain matrices, and the inner ones have no role of their own.
            chained = own == "weight" and isinstance(owner, nn.Linear | Conv1D)
            if name in routers or not (name in named or chained):
                continue
            transposed = (
                anatomy.experts_transposed if weight.ndim == 3 else isinstance(owner, Conv1D)
            )
            found[name] = weight.mT if transposed else weight
    return found
