"""Tempered gradient ascent: ascent on each answer token that fades as the token is forgotten.

    loss = sum over answer tokens of (p_t^q - 1) / q,    p_t = p(y_t | x, y_<t)

averaged over the answer tokens of the step; in (-1 / q, 0] per token. Its gradient is that of
ascent times p_t^q, so improbable tokens are left alone and the loss has a lower bound. Towards
q = 0 it becomes gradient ascent. It is the generalised cross-entropy with its sign turned.

Paper: arXiv 1805.07836 (generalised cross-entropy). Deviations: none in the loss.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


@register(
    kind="objective",
    name="tempered_ascent",
    title="Tempered gradient ascent",
    summary="Climbs the loss of forget tokens, the less the less likely they are already.",
    paper="1805.07836",
    year=2018,
    family="divergence",
    needs=("forget",),
    changes="weights",
    reversible=False,
)
class TemperedAscent(Objective):
    """Options of tempered ascent."""

    q: float = Field(0.5, gt=0, le=1, description="How soon the ascent fades; near 0: never.")

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Tensor:
        # token_logprobs is 0 where a row has no token, and so is expm1(0)
        return torch.expm1(self.q * step.forget.token_logprobs).sum(dim=1) / self.q
