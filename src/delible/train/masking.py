"""Updates that leave masked entries of weights where they are.

Masks are by parameter name: True where an entry may move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from delible.train.slots import Placement

Masks = Mapping[str, Tensor] | None


def mask_gradients(placement: Placement, masks: Masks) -> None:
    """Takes the gradient of entries that may not move."""
    for name, mask in (masks or {}).items():
        gradient = placement.parameters[name].grad
        if gradient is not None:
            gradient.mul_(mask)


@contextmanager
def held_outside(placement: Placement, masks: Masks) -> Iterator[None]:
    """Where masks change from step to step, the optimiser's momentum does not see them."""
    held = masks if placement.each_step is not None and masks else {}
    with torch.no_grad():
        kept = {name: placement.parameters[name].detach().clone() for name in held}
        yield
        for name, mask in held.items():
            parameter = placement.parameters[name]
            parameter.copy_(torch.where(mask, parameter, kept[name]))


@torch.no_grad()
def decay_masked(placement: Placement, masks: Masks, share: float) -> None:
    """Decays the entries of matrices that may move by a share, if the placement wants it."""
    if masks and placement.masked_decay and share:
        for name, mask in masks.items():
            parameter = placement.parameters[name]
            if parameter.ndim >= 2:
                parameter.mul_(1 - share * mask)
