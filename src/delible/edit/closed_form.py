"""Closed forms: what is added to a matrix so that it gives other values at some keys.

A change of W is sum_i r_i x_i^T: at a key k it adds sum_i (x_i . k) r_i. Residuals r say what is to
be added, factors x at which keys, and a symmetric map B what may be written to on the way:

    X = B K (K^T B K + a)^-1 E          the first columns of the identity: E

B = C^-1 keeps what is written at ordinary keys, whose second moment is C: X is K^T (a C + K K^T)^-1
transposed. B = P keeps it exactly at every key outside of the range of the projector P: X solves
(P K K^T + a) X = P K E. Keys that stand behind the first ones in K are of earlier edits and get
nothing: with K_p for them, a C + K_p K_p^T stands for a C, and P K_p K_p^T is added to P K K^T.
All of it is in float64, in the space of the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

#: B: from [width, edits] to [width, edits], both float64.
Map = Callable[[Float[Tensor, "width edits"]], Float[Tensor, "width edits"]]


def projector(null: Float[Tensor, "width directions"]) -> Map:
    """P = null null^T, for orthonormal columns."""
    basis = null.double()
    return lambda keys: basis @ (basis.T @ keys.double())


def inverse(moment: Float[Tensor, "width width"], ridge: float) -> Map:
    """(C + ridge tr(C) / width)^-1: by a Cholesky factor, which is made once.

    Args:
        moment: C, positive semidefinite.
        ridge: Share of the mean eigenvalue, above 0: a moment of few tokens has no inverse.
    """
    value = moment.double()
    mean = value.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = value + ridge * mean * torch.eye(len(value), dtype=value.dtype, device=value.device)
    lower = torch.linalg.cholesky(damped)
    return lambda keys: torch.cholesky_solve(keys.double(), lower)


def sparing(within: Map, earlier: Float[Tensor, "width earlier"], weight: float) -> Map:
    """B' = (B^-1 + w sum_i k_i k_i^T / (k_i^T B k_i))^-1: keys of earlier edits join what is kept.

    Args:
        within: B.
        earlier: Keys of edits that stay.
        weight: w, not negative. What is written at one of them falls to 1 / (1 + w); 0 is B.
    """
    if weight == 0 or earlier.shape[1] == 0:
        return within
    keys, mapped = earlier.double(), within(earlier)
    own = (keys * mapped).sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    inner = keys.T @ mapped + torch.diag(own / weight)

    def spared(new: Float[Tensor, "width edits"]) -> Float[Tensor, "width edits"]:
        found = within(new)
        return found - mapped @ torch.linalg.solve(inner, keys.T @ found)

    return spared


def identity() -> Map:
    """B = 1: nothing but the keys themselves decides."""
    return lambda keys: keys.double()


def squares(keys: Float[Tensor, "width edits"], within: Map) -> Float[Tensor, " edits"]:
    """k^T B k of each key: what ``damping`` is to be compared with."""
    return (keys.double() * within(keys)).sum(dim=0)


def factors(
    keys: Float[Tensor, "width edits"],
    within: Map,
    damping: float,
    earlier: Float[Tensor, "width earlier"] | None = None,
) -> Float[Tensor, "width edits"]:
    """X: the factors that belong to the residuals of the keys.

    Args:
        keys: K, of what is edited now.
        within: B.
        damping: a, not negative; 0 writes each residual whole, if the keys are independent.
        earlier: Keys of edits that stay.
    """
    count = keys.shape[1]
    every = keys.double() if earlier is None else torch.cat([keys, earlier], dim=1).double()
    mapped = within(every)
    unit = torch.eye(every.shape[1], dtype=every.dtype, device=every.device)
    return mapped @ torch.linalg.solve(every.T @ mapped + damping * unit, unit[:, :count])


def rank_one(
    mean: Float[Tensor, " width"], key: Float[Tensor, " width"], within: Map
) -> Float[Tensor, " width"]:
    """u / (u . k) with u = B mean: the factor that writes a residual whole at the key.

    Args:
        mean: Mean key over contexts, which gives the direction.
        key: The key at which the value is to be exact.

    Returns:
        Zeros if the direction has no share of the key.
    """
    direction = within(mean[:, None])[:, 0]
    power = direction @ key.double()
    return direction / power if float(power.abs()) > 0 else torch.zeros_like(direction)
