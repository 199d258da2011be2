"""Every forget row is used."""

from __future__ import annotations

from delible.registry import register
from delible.train.slots import Select, SlotContext


@register(
    kind="select",
    name="all",
    title="All rows",
    summary="Uses every forget row.",
    needs=("forget",),
)
class All(Select):
    """Has no options."""

    def choose(self, context: SlotContext) -> list[int]:
        return list(range(len(context.rows["forget"])))
