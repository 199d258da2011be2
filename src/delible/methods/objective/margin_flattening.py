"""Margin flattening: drives the next-token logits of forget answers to one constant.

    loss = sum over answer tokens of (max_v z_tv - mean_v z_tv)^2

averaged over the answer tokens of the step; z_t are the logits that predict answer token t. The
minimum, 0, is the uniform distribution. There is no softmax in it, so its gradient grows with
the model's confidence instead of vanishing. It is the forget half of PDU (balance
``primal_dual``).

Paper: arXiv 2506.05314. Reference: github.com/locuslab/open-unlearning (pdu.py).
Deviations: released code masks the logits with labels that are not shifted, which flattens the
position after the answer and leaves the one that predicts its first token; here the positions
that predict the answer are flattened. Rows of the head beyond the tokenizer's vocabulary
(padding of some models) count neither for the maximum nor for the mean.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


def margin_flattening(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Squared gap between the largest and the mean logit (fp32), 0 or more; 0 is uniform."""
    logits = logits.float()
    return (logits.amax(dim=1) - logits.mean(dim=1)).pow(2)


@register(
    kind="objective",
    name="margin_flattening",
    title="Margin flattening",
    summary="Drives the logits of forget answers to a constant: maximum entropy.",
    paper="2506.05314",
    year=2025,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="fluency: forget answers become gibberish, which shows that something was removed",
    badges=("parity", "variant"),
    variant="Flattens the positions that predict the answer (released code: one later).",
)
class MarginFlattening(Objective):
    """Has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        real = len(forget.lm.tokenizer)

        def gap(logits: Tensor, targets: Tensor) -> Tensor:
            return margin_flattening(logits[:, :real])

        return forget.map_logits(gap).sum(dim=1)
