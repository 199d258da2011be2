"""CKA: are this model's hidden states more like the original's, or like the reference's?

A cheap relative of activation patching that asks nothing of any head. With the states X and Y
[token, hidden] of two models at the positions that predict the facts' tokens, centred by column,

    CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|)                                 (Frobenius norms)
    gone_l = clip((CKA(U, R) - CKA(M, R)) / (1 - CKA(M, R)), 0, 1)            in each layer l

The layers' mean is weighted by 1 - CKA(M, R): a layer in which original and reference are alike
tells nothing. It is one number for a system, not one for a record, so it is told beside the
verdict and gives no e.

Paper: arXiv 2605.24614; CKA: arXiv 1905.00414. Reference code:
github.com/gnueaj/unlearning-depth-score.
Deviations: those of 'patching'. The weights of the mean are those of the reference code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from pydantic import Field

from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Seen
from delible.measure.depth import compared
from delible.measure.entities import Entity, LooksForFacts, entities_of
from delible.records import RecordBase
from delible.registry import register

WHERE = "attack 'cka'"


def linear_cka(
    left: Float[np.ndarray, "token hidden"], right: Float[np.ndarray, "token width"]
) -> float | None:
    """Likeness of two sets of states of the same tokens, in [0, 1]; None if one of them is still.

    Turning, mirroring or scaling a set as a whole changes nothing.
    """
    x, y = (one.astype(np.float64) - one.mean(axis=0, dtype=np.float64) for one in (left, right))
    if len(x) <= min(x.shape[1], y.shape[1]):  # by tokens: the smaller products
        x_own, y_own = x @ x.T, y @ y.T
        shared = float((x_own * y_own).sum())
    else:
        x_own, y_own = x.T @ x, y.T @ y
        shared = float(((x.T @ y) ** 2).sum())
    size = float(np.linalg.norm(x_own) * np.linalg.norm(y_own))
    return shared / size if np.isfinite(size) and size > 0 else None


@register(
    kind="attack",
    name="cka",
    title="Likeness of hidden states (CKA)",
    summary="Tells by layer whether hidden states are like the original's or the reference's.",
    paper="2605.24614",
    year=2026,
    family="inside",
    needs=("forget", "weights"),
    changes="nothing",
    reversible=True,
    capability="hidden",
    depth="standard",
    misleads="Damage of any kind takes states away from the original's; likeness is not knowledge.",
    badges=("variant",),
    variant="Chat template; the fact is found by the record's aliases.",
)
class CKA(LooksForFacts):
    """Options of the comparison."""

    weighs = False

    smallest_gap: float = Field(
        1e-3, ge=0, lt=1,
        description="A layer tells something if original and reference are less alike than 1 less "
        "this.",
    )  # fmt: skip

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """The share of the way from the original to the reference, and what is left by layer.

        Raises:
            DataError: The original, the reference, or a fact to look for is missing.
            ModelError: The models cannot be compared layer by layer.
        """
        original, reference = compared(lm, context.original, context.reference, WHERE)
        _, entities, _ = entities_of(original, records, self.tokens, WHERE)
        whole, least, found = (_states(one, entities, context) for one in (original, reference, lm))
        gone: list[float | None] = []
        weights: list[float] = []
        for m, r, u in zip(whole, least, found, strict=True):
            far, near = linear_cka(m, r), linear_cka(u, r)
            if far is None or near is None or 1 - far <= self.smallest_gap:
                gone.append(None)
                continue
            gone.append(min(1.0, max(0.0, (near - far) / (1 - far))))
            weights.append(1 - far)
        shares = [one for one in gone if one is not None]
        mean = float(np.average(shares, weights=weights)) if shares else None
        layers = [None if one is None else 1.0 - one for one in gone]
        return Seen(None, {"like_the_reference": mean}, layers)


def _states(
    lm: LM, entities: Sequence[Entity], context: AttackContext
) -> Float[np.ndarray, "layer token hidden"]:
    """The states of all facts' tokens, one after the other."""
    found = context.states.states(lm, [one.span for one in entities])
    return np.concatenate([one["block"].numpy() for one in found], axis=1)
