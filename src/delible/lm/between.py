"""Models on the straight line between two that have the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.lm import LM


def interpolated(first: LM, second: LM, share: float) -> LM:
    """(1 - share) first + share second, weight by weight, in fp32; both stay as they are.

    Raises:
        RecipeError: Their parameters have other names or shapes.
    """
    result = first.copy()
    move_between(result, first, second, share)
    return result


def move_between(lm: LM, first: LM, second: LM, share: float) -> None:
    """Puts the weights of :func:`interpolated` into a third model of the same form.

    Raises:
        RecipeError: Their parameters have other names or shapes.
    """
    ours: dict[str, Tensor] = dict(first.model.named_parameters())
    theirs: dict[str, Tensor] = dict(second.model.named_parameters())
    if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
        raise RecipeError("only models with the same parameters have a line between them.")
    with torch.no_grad():
        for name, value in lm.model.named_parameters():
            # not lerp: at 0 and at 1 the result must be the end itself
            end = theirs[name].to(value.device).float()
            value.copy_((1 - share) * ours[name].to(value.device).float() + share * end)
    lm.touch()
