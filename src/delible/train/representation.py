"""What losses on hidden states share: distances per row, over the positions that count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def squared_distance(
    states: Float[Tensor, "rows sequence hidden"],
    target: Float[Tensor, "rows sequence hidden"],
    positions: Bool[Tensor, "rows sequence"],
) -> Float[Tensor, " rows"]:
    """Squared difference per row, mean over hidden, sum over positions; 0 or more.

    Args:
        target: May have one position for all.
        positions: Which ones count; what stands at others has no effect, not even NaN.
    """
    difference = torch.where(positions[..., None], states.float() - target.float(), 0.0)
    return difference.pow(2).mean(dim=2).sum(dim=1)


def without_first(positions: Bool[Tensor, "rows sequence"]) -> Bool[Tensor, "rows sequence"]:
    """Positions but the first of each row, whose state is huge in most models and says nothing."""
    kept = positions.clone()
    kept[:, 0] = False
    return kept
