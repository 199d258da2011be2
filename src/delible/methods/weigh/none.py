"""Every forget row counts the same."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.slots import SlotContext, Weigh


@register(
    kind="weigh",
    name="none",
    title="Equal weights",
    summary="Every forget row counts the same.",
    needs=("forget",),
)
class Equal(Weigh):
    """Has no options."""

    def weights(self, context: SlotContext) -> Float[Tensor, " rows"]:
        return torch.ones(len(context.rows["forget"]))
