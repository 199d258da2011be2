"""Random labels: the forget rows' tokens are trained towards tokens drawn anew at every step.

    loss = - sum over answer tokens of log p(r_t | x, y_<t),    r_t uniform over the vocabulary

averaged over answer tokens. Its expectation is least where every token is equally likely, so it
ends by itself near log V, while ascent has no end; on the way it writes noise into what it trains.
A row's labels depend on the seed, the step and the row alone.

Paper: FIT (arXiv 2601.21682), there for what the model holds weakly; the idea is older (random
relabelling, arXiv 1911.04933). Reference code: XiaoyuXU1/FIT. Deviations: answer tokens only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Unit
from delible.train.step import Step


def label_nll(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """-log p of a label at each token, in nats, 0 or more."""
    return logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


@register(
    kind="objective",
    name="random_label",
    title="Random labels",
    summary="Trains the forget rows' tokens towards tokens drawn anew at every step.",
    paper="2601.21682",
    year=2026,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="what is kept: noise at a high rate or over many requests wears the model down",
    badges=("parity",),
)
class RandomLabel(Objective):
    """It has no options."""

    unit: ClassVar[Unit] = "answer_token"

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        drawn = [
            torch.randint(
                forget.lm.vocabulary, (row.encoded.answer_tokens,),
                generator=step.generator("random_label", row.key, row.index),
            )
            for row in forget.rows
        ]  # fmt: skip
        labels = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True).to(forget.mask.device)

        def each(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
            return label_nll(logits, labels)

        return forget.map_logits(each, marks=labels).sum(dim=1)
