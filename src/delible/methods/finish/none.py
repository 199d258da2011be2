"""Nothing happens after the last step."""

from __future__ import annotations

from delible.lm.lm import LM
from delible.registry import register
from delible.train.slots import Finish, FinishContext


@register(
    kind="finish",
    name="none",
    title="As trained",
    summary="Keeps the model as the last step left it.",
)
class AsTrained(Finish):
    """Has no options."""

    def apply(self, context: FinishContext) -> LM:
        return context.lm
