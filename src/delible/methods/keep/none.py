"""No retain loss."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.step import Group


@register(
    kind="keep",
    name="none",
    title="No retain loss",
    summary="Nothing protects the rest of what the model knows.",
)
class NoKeep(Keep):
    """Has no options."""

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        return retain.answer_states.new_zeros(len(retain.rows))
