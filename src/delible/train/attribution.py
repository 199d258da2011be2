"""How much blocks and records matter: losses without a block, gradients at the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.hooks import skipped, steer
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.system.asks import Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.train.rows import make_rows


def mean_loss(lm: LM, records: Sequence[RecordBase]) -> tuple[list[float], list[int]]:
    """-log p of each record's answer (of a passage: of the text), summed, and its tokens."""
    asked = [Score(prompt, answer_of(one)) for one in records if (prompt := ask(one)) is not None]
    found = lm.score(asked)
    told = [one for one in found if isinstance(one, TokenScores)]
    return [float(-one.logprobs.sum()) for one in told], [len(one.logprobs) for one in told]


def skipping_scores(lm: LM, records: Sequence[RecordBase], most_tokens: int) -> list[float]:
    """|L(without block l) - L| of every block; L the mean loss of the first so many tokens."""
    chosen: list[RecordBase] = []
    for one in records:
        if chosen and sum(answer_tokens(lm, each) for each in chosen) >= most_tokens:
            break
        chosen.append(one)

    def loss() -> float:
        sums, counts = mean_loss(lm, chosen)
        return sum(sums) / max(1, sum(counts))

    plain, found = loss(), []
    for layer in range(lm.anatomy.layers):
        with skipped(lm.core, lm.anatomy.block_path(layer)):
            found.append(abs(loss() - plain))
    return found


def answer_tokens(lm: LM, record: RecordBase) -> int:
    """Tokens of a record's answer."""
    prompt = ask(record)
    return 0 if prompt is None else lm.template.encode(prompt, answer_of(record)).answer_tokens


def embedding_gradient(lm: LM, record: RecordBase, scale: float = 1.0) -> float:
    """Frobenius norm of d (scale L) / d embeddings, L the mean loss of one record's tokens."""
    (row,) = make_rows(lm.template, [record], None, role="forget")  # type: ignore[list-item]
    batch = replace(collate([row.encoded], lm.pad_id, lm.device), prefix=0)
    leaves: list[Tensor] = []

    def leaf(states: Tensor) -> Tensor:
        leaves.append(states.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), lm.evaluating(), steer(lm.core, lm.anatomy.embedding, leaf):
        with lm.computing():
            states = Forward(lm)(batch)[0]
            logs = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
        (gradient,) = torch.autograd.grad(-scale * logs.mean(), leaves)
    return float(gradient.float().norm())


__all__ = ["answer_tokens", "embedding_gradient", "mean_loss", "skipping_scores"]
