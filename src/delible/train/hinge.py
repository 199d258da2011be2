"""The inverted hinge loss: a token loses to the likeliest other one, and no further."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def inverted_hinge(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """1 + p(target) - max of the other tokens' p, per token, in [0, 2]; 0: another is certain.

    Paper: arXiv 2408.06621.
    """
    probabilities = logits.softmax(dim=1)
    own = probabilities.gather(1, targets[:, None])[:, 0]
    others = probabilities.scatter(1, targets[:, None], 0.0)
    return 1 + own - others.amax(dim=1)


__all__ = ["inverted_hinge"]
