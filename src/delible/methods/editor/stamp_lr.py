"""STAMP-LR: STAMP in a small basis of the key space, so that the inverse is r x r.

    S = U^T K,    Delta = R W S^T (S W S^T + epsilon I_r)^-1 U^T

U is an orthonormal basis of r directions: those of the forgotten keys first, then the leading
ones of the other keys, made orthogonal to them. With r at least the rank of K it is STAMP.

Paper: arXiv 2604.12820. No reference code is known. Deviations: as for STAMP; the basis begins
with the forgotten keys, which plain leading singular vectors can miss when they are few; epsilon
is a share of the same mean square as in STAMP (over the width, not over r), so that both agree.

Limits: those of STAMP. With fewer directions than independent forgotten keys a part of the change
is missing, which is said; kept keys are met only within the basis.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.replace import key_readers, missing_share, penalty
from delible.edit.to_refusal import ToRefusal
from delible.ranges import Range
from delible.registry import register

logger = logging.getLogger(__name__)

#: Singular values below this share of the largest one are no direction of their own.
NEGLIGIBLE = 1e-9
#: Missing share of the wanted change that is said.
MISSING = 0.05


def key_basis(
    keys: Float[Tensor, "width keys"], forgotten: int, rank: int
) -> Float[Tensor, "width rank"]:
    """Orthonormal directions: of the forgotten keys, then the leading ones of the others.

    Args:
        keys: K, the forgotten ones first.
        forgotten: How many of them.
        rank: Directions at most; fewer where the keys have no more.
    """
    own = _leading(keys[:, :forgotten].double(), rank)
    others = keys[:, forgotten:].double()
    left = rank - own.shape[1]
    if left == 0 or others.shape[1] == 0:
        return own
    scale = float(others.norm())
    for _ in range(2):  # the second time takes off what rounding has left
        others = others - own @ (own.T @ others)
    rest = _leading(others, left, scale)
    return torch.cat([own, rest], dim=1)


def _leading(vectors: Tensor, count: int, scale: float | None = None) -> Tensor:
    """Leading left singular vectors of what is not negligible."""
    found = torch.linalg.svd(vectors, full_matrices=False)
    least = NEGLIGIBLE * (float(found.S[0]) if scale is None else scale)
    return found.U[:, : min(count, int((least < found.S).sum()))]


def low_rank_change(
    residuals: Float[Tensor, "hidden forget"],
    keys: Float[Tensor, "width keys"],
    weights: Float[Tensor, " keys"],
    ridge: float,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """(left, right) of Delta in the basis; of the two ways to write it the one of smaller rank.

    Args:
        residuals: R_f; at the other keys nothing is to change.
        keys: K, the forgotten ones first.
        weights: One per key, above 0.
        ridge: As in STAMP.
        rank: Directions of the basis at most.
    """
    wanted = residuals.shape[1]
    basis = key_basis(keys, wanted, rank)
    readers = key_readers(basis.T @ keys.double(), weights, penalty(keys, weights, ridge))[:wanted]
    residuals = residuals.double()
    if wanted <= basis.shape[1]:
        return residuals, readers @ basis.T
    return residuals @ readers, basis.T


@register(
    kind="editor",
    name="stamp_lr",
    title="STAMP-LR",
    summary="Moves questions to a refusal as STAMP does, in a small basis of the key space.",
    paper="2604.12820",
    year=2026,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="a forced start of the answer; wordings and conversations unlike those edited",
    advice="the model must decline what nobody can answer, as for stamp; --rank at least the "
    "number of questions x wordings, or a part of the change is missing",
    badges=("variant",),
    variant="The block's output is moved at 0.85 of the depth; the basis begins with the forgotten "
    "keys; checked before it is committed.",
)
class STAMPLR(ToRefusal):
    """Options of STAMP-LR."""

    rank: int = Field(128, ge=1, description="Directions of the basis (64 to 128 in the paper).")

    def ranges(self) -> dict[str, Range]:
        return {**super().ranges(), "rank": Range(low=64, high=128, log=True)}

    def factors(
        self,
        residuals: Float[Tensor, "hidden forget"],
        keys: Float[Tensor, "width keys"],
        weights: Float[Tensor, " keys"],
    ) -> tuple[Tensor, Tensor]:
        left, right = low_rank_change(residuals, keys, weights, self.ridge, self.rank)
        missing = missing_share(residuals, left, right, keys)
        if missing > MISSING:
            logger.warning(
                f"stamp_lr: {missing:.0%} of the wanted change is missing in {self.rank} "
                f"directions for {residuals.shape[1]} forgotten keys; raise rank, or forget_weight."
            )
        return left, right
