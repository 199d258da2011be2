"""Every weight may move."""

from __future__ import annotations

from delible.registry import register
from delible.train.slots import Place, Placement, SlotContext


@register(
    kind="place",
    name="all",
    title="All weights",
    summary="Trains every parameter.",
    needs=("weights",),
    changes="weights",
)
class AllWeights(Place):
    """Has no options."""

    def apply(self, context: SlotContext) -> Placement:
        parameters = context.gradients.parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return Placement(parameters)
