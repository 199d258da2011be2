"""Inverted hinge loss: each answer token loses to the likeliest other token, and no further.

    loss = sum over answer tokens of 1 + p_t - max over v != y_t of p_v

averaged over the answer tokens of the step, with p_v the probabilities of the vocabulary and p_t
that of the answer token y_t. It lies in [0, 2]: 2 where the token is certain, 1 where another one
ties with it, 0 where another one is certain. Unlike ascent it has a bound, and its gradient goes
to two tokens instead of the whole vocabulary: the answer's falls, the runner-up's rises.

Paper: arXiv 2408.06621 (LoKU); also used in arXiv 2508.21300. Reference code:
github.com/kyj93790/VILA.
Deviations: none. The loss of the paper is max(0, ...) of this, which cannot be below 0.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.hinge import inverted_hinge
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


@register(
    kind="objective",
    name="ihl",
    title="Inverted hinge loss",
    summary="Lowers each forget token until another token is certain; bounded, two tokens move.",
    paper="2408.06621",
    year=2024,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning: the runner-up takes over, and what stands behind it is left alone",
    badges=("parity",),
)
class IHL(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        return step.forget.map_logits(inverted_hinge).sum(dim=1)
