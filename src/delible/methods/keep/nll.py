"""Retain loss: the answer's negative log-likelihood on retain rows.

    loss = - sum over answer tokens of log p(y_t | x, y_<t)

averaged over the answer tokens of all retain rows of the step.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Keep
from delible.train.row import Unit
from delible.train.step import Group


@register(
    kind="keep",
    name="nll",
    title="Negative log-likelihood on retain rows",
    summary="Goes on teaching the retain rows while the forget rows are unlearned.",
    year=2022,
    family="retain",
    needs=("retain",),
    changes="weights",
    badges=("parity",),
)
class NLL(Keep):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        return -retain.logprob_sum
