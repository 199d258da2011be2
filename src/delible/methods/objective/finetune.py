"""Fine-tuning: plain descent on the rows, to teach them (targets, references, relearning).

    loss = - sum over answer tokens of log p(y_t | x, y_<t)

averaged over the answer tokens of the whole step.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


@register(
    kind="objective",
    name="finetune",
    title="Fine-tuning",
    summary="Descends the answer loss on the given rows: teaches instead of forgets.",
    family="baseline",
    needs=("forget",),
    changes="weights",
    reversible=False,
    badges=("parity",),
)
class Finetune(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        return -step.forget.logprob_sum
