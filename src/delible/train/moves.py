"""After the first steps: what should move did, and the rest did not. A few entries tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from delible.errors import RunError
from delible.lm.held import pieces
from delible.lm.lm import LM
from delible.lm.sharded import share_of, summed
from delible.train.slots import Placement

#: Entries of a parameter that are looked at.
ENTRIES = 256


@torch.no_grad()
def sampled(lm: LM, placement: Placement) -> dict[str, Tensor]:
    """A few entries of every parameter of the model, or of this process's share of it."""
    lm.settle()
    return {
        name: _sample(placement, name, value).clone() for name, value in lm.model.named_parameters()
    }


def _sample(placement: Placement, name: str, value: Tensor) -> Tensor:
    """A few entries of a parameter: among those that may move, if it is masked."""
    mask = (placement.masks or {}).get(name)
    flat = pieces(value.detach())[0].flatten()
    if placement.each_step is not None:  # which rows will move is not known yet
        return flat[:: max(1, len(flat) // ENTRIES)]
    if mask is None:
        return flat[:ENTRIES]
    return flat[share_of(mask).flatten().nonzero()[:ENTRIES, 0]]


@torch.no_grad()
def check_moves(lm: LM, placement: Placement, before: Mapping[str, Tensor], place: str) -> None:
    """Compares with what :func:`sampled` gave before the first step.

    Raises:
        RunError: A frozen parameter moved, or nothing did.
    """
    lm.settle()
    own = {id(value) for value in placement.parameters.values()}
    moved = 0
    for name, value in lm.model.named_parameters():
        same = torch.equal(_sample(placement, name, value), before[name])
        if id(value) not in own and not same:
            raise RunError(f"the frozen parameter {name} moved; this is a bug.")
        moved += not same
    if not summed(moved, over=placement.parameters.values()):
        raise RunError(
            "nothing moved in the first steps.",
            where=f"place '{place}'",
            hint="Raise --learning-rate, or check that the forget loss is not 0.",
        )
