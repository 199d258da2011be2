"""Scores of answers: which share a tree and which stay plain rows, and their values in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from delible.lm.attention import attention_window
from delible.lm.body import Body
from delible.lm.forward import Forward, collate, map_logits
from delible.lm.template import Encoded
from delible.lm.tree import NodeFunction, Prefix, Tree, shared_by, tree_values
from delible.lm.values import token_values
from delible.system.asks import NoAnswer, Score, TokenScores

NOT_FINITE = "the model gives values that are not finite numbers"


@torch.inference_mode()
def score(
    lm: Body, requests: Sequence[Score], rows: Sequence[Encoded], tell: Callable[[int], None]
) -> list[TokenScores | NoAnswer]:
    """Log-probabilities and argmax hits at the answers' tokens; ``rows`` are the requests' tokens.

    Args:
        tell: Called with the number of answers that are done.
    """
    trees, alone = sharing(lm, rows)
    function = partial(token_values, moments=any(one.moments for one in requests))
    results: list[TokenScores | NoAnswer] = [NoAnswer("")] * len(requests)
    for indices, values in chain(
        by_prompt(lm, rows, trees, function), by_length(lm, rows, alone, function)
    ):
        parts = values.split([rows[index].answer_tokens for index in indices])
        for index, part in zip(indices, parts, strict=True):
            columns = part.T.numpy().copy()
            results[index] = (
                TokenScores(columns[0], columns[1] > 0.5, rows[index].has_end, *columns[2:])
                if np.isfinite(columns).all()
                else NoAnswer(NOT_FINITE)
            )
        tell(len(indices))
    return results


def sharing(lm: Body, rows: Sequence[Encoded]) -> tuple[list[list[int]], list[int]]:
    """Places of rows: in groups that share a tree, and those that must stay plain rows."""
    window = attention_window(lm) if lm.grows_trees else 0
    groups, alone = list[list[int]](), list[int]()
    questions: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if len(row.ids) > window:  # a tree would let a token see what its layer forgets
            alone.append(index)
        else:
            questions.setdefault(row.ids[: row.start], []).append(index)
    for question, mine in questions.items():
        lengths = [rows[index].answer_tokens for index in mine]
        for places in shared_by(len(question), lengths, lm.anatomy.hidden_size):
            groups.append([mine[place] for place in places])
    return groups, alone


def by_length(
    lm: Body, rows: Sequence[Encoded], among: Sequence[int], function: NodeFunction
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of rows of like length; values [tokens, …] of the answers' tokens."""
    forward = Forward(lm)

    def each(logits: Tensor, targets: Tensor) -> Tensor:
        return function(logits, torch.arange(len(targets), device=targets.device), targets)

    order = sorted(among, key=lambda index: len(rows[index].ids), reverse=True)
    for indices in lm.batches(order, [len(row.ids) for row in rows]):
        batch = collate([rows[index] for index in indices], lm.pad_id, lm.device)
        states = forward(batch)[0]
        yield indices, map_logits(lm.head, states, batch.targets, each, lm.vocabulary).cpu()


def by_prompt(
    lm: Body, rows: Sequence[Encoded], groups: Sequence[Sequence[int]], function: NodeFunction
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of trees, each of a question with a group of its answers."""
    prompts = [rows[group[0]].ids[: rows[group[0]].start] for group in groups]
    prefix = Prefix.of(prompts, lm)
    trees = [
        Tree.grow(prompt[len(prefix.ids) :], [rows[index].ids[len(prompt) :] for index in mine])
        for prompt, mine in zip(prompts, groups, strict=True)
    ]
    for places in lm.filled([len(tree.ids) for tree in trees]):
        values = tree_values(lm, prefix, [trees[place] for place in places], function)
        yield [index for place in places for index in groups[place]], values
