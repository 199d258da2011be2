"""No hardening: both gradients at the weights as they are, in one pass."""

from __future__ import annotations

from typing import ClassVar

from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Harden


@register(
    kind="harden",
    name="none",
    title="No hardening",
    summary="Takes the gradient where the weights are.",
)
class NoHarden(Harden):
    """Has no options."""

    single_pass: ClassVar[bool] = True

    def forget(self, passes: Passes) -> None:
        passes.forget()
