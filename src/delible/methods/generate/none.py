"""No rows are made: the method works with the records it is given."""

from __future__ import annotations

from delible.records import RecordBase
from delible.registry import register
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext


@register(
    kind="generate",
    name="none",
    title="No generated rows",
    summary="Makes no rows: the method works with the records it is given.",
)
class NoRows(Generate):
    """Has no options."""

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        return {}
