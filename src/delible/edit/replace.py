"""What a matrix writes at some keys is replaced, at other keys it is kept: the closed form.

    Delta = argmin sum_i w_i |r_i - Delta k_i|^2 + epsilon |Delta|^2
          = R W K^T (K W K^T + epsilon I)^-1 = R Y

Columns of K are keys, those of R what is to be added at them (zero where nothing is to change).
It is the delta that is solved for: solving for the new matrix itself would wipe what it writes in
every direction that no key has. With epsilon = 0 it is the pseudo-inverse: fewer independent keys
than directions are met exactly, and what is orthogonal to all of them is left alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def penalty(
    keys: Float[Tensor, "width keys"], weights: Float[Tensor, " keys"], ridge: float
) -> float:
    """epsilon = ridge x tr(K W K^T) / width: a share of the mean squared weighted key entry."""
    return ridge * float((keys.square().sum(dim=0) * weights).sum()) / keys.shape[0]


def key_readers(
    keys: Float[Tensor, "width keys"],
    weights: Float[Tensor, " keys"],
    epsilon: float,
    form: Literal["auto", "primal", "gram"] = "auto",
) -> Float[Tensor, "keys width"]:
    """Y of Delta = R Y, in float64; row i reads how much of key i a vector holds.

    Args:
        keys: K, one column per key.
        weights: Diagonal of W, above 0.
        epsilon: At least 0; 0 is the pseudo-inverse.
        form: ``"primal"`` solves width x width, ``"gram"`` keys x keys: the same result.
            ``"auto"`` takes the smaller.
    """
    root = weights.double().sqrt()
    scaled = keys.double() * root
    width, count = scaled.shape
    if epsilon == 0:
        return root[:, None] * torch.linalg.pinv(scaled)
    if form == "gram" or (form == "auto" and count < width):
        eye = torch.eye(count, dtype=scaled.dtype, device=scaled.device)
        return root[:, None] * torch.linalg.solve(scaled.T @ scaled + epsilon * eye, scaled.T)
    eye = torch.eye(width, dtype=scaled.dtype, device=scaled.device)
    solved: Tensor = torch.linalg.solve(scaled @ scaled.T + epsilon * eye, scaled).T
    return root[:, None] * solved


def missing_share(
    residuals: Float[Tensor, "hidden wanted"],
    left: Float[Tensor, "hidden rank"],
    right: Float[Tensor, "rank width"],
    keys: Float[Tensor, "width keys"],
) -> float:
    """|R_f - Delta K_f| / |R_f|: how much of the wanted change is not made, in [0, 1]; 0 = none.

    Args:
        residuals: What is wanted at the first keys.
        left, right: Delta = left @ right.
        keys: K.
    """
    wanted = residuals.double()
    made = left.double() @ (right.double() @ keys[:, : wanted.shape[1]].double())
    return float((wanted - made).norm() / wanted.norm().clamp(min=1e-30))


__all__ = ["key_readers", "missing_share", "penalty"]
