"""What losses on attention share: which tokens of a row matter, where attention should be, and how
far it is from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from delible.lm.forward import Forward, collate, map_logits, scatter
from delible.lm.lm import LM
from delible.train.keywords import decoded, name_spans, word_spans
from delible.train.row import Row
from delible.train.step import Group
from delible.watching import Stage, watched
from delible.world.filters import is_function_word

#: How tokens that matter are told.
Importance = Literal["content", "entropy"]
#: Added to probabilities inside logarithms.
TINY = 1e-8


# ---- which tokens matter


def own_tokens(row: Row) -> list[int]:
    """Positions of what was asked and answered, without what the chat template adds and without
    the first one, which attention falls back to.
    """
    ids, start = row.encoded.ids, row.encoded.start
    special = set(row.tokenizer.all_special_ids)
    text, places = decoded(row.tokenizer, (), ids[:start])
    spans, end = [], len(text)
    for asked in reversed(row.asked):
        at = text.rfind(asked.strip(), 0, end)
        if asked.strip() and at >= 0:
            spans.append((at, at + len(asked.strip())))
            end = at
    inside = [
        place
        for place, (first, last) in enumerate(places)
        if any(begin < last and first < stop for begin, stop in spans)
    ]
    every = [*inside, *range(start, len(ids))]
    return [place for place in every if place > 0 and ids[place] not in special]


def content_tokens(row: Row, share: float) -> Bool[Tensor, " sequence"]:
    """Tokens of content words (all but a list of English function words), whole words at a time.

    Names and numbers come first, then long words before short ones, until ``share`` of the row's
    own tokens is reached; at least one word.
    """
    ids = row.encoded.ids
    own = own_tokens(row)
    text, places = decoded(row.tokenizer, (), ids)
    names = name_spans(text, row.asked, row.subject or "")
    words: list[tuple[bool, int, int, list[int]]] = []
    for first, last in word_spans(text):
        tokens = [at for at in own if places[at][0] < last and first < places[at][1]]
        if tokens and not is_function_word(text[first:last]):
            named = any(begin < last and first < end for begin, end in names)
            words.append((not named, first - last, first, tokens))
    found = torch.zeros(len(ids), dtype=torch.bool)
    for index, (_, _, _, tokens) in enumerate(sorted(words)):
        wanted = found.clone()
        wanted[tokens] = True
        if index and int(wanted.sum()) > share * len(own):
            break
        found = wanted
    return found


@torch.no_grad()
def entropy_changes(lm: LM, row: Row, places: Sequence[int]) -> Float[Tensor, " places"]:
    """How much less sure of the answer a model is without a token: mean entropy of what it
    predicts at the answer's tokens, in nats, minus that with all tokens. Infinite for the only
    token of an answer.
    """
    whole = row.encoded
    shorter = [
        replace(
            whole,
            ids=(*whole.ids[:place], *whole.ids[place + 1 :]),
            start=whole.start - (place < whole.start),
        )
        for place in places
    ]
    asked = [whole, *(one for one in shorter if len(one.ids) > one.start)]
    entropies: list[float] = []
    forward = Forward(lm)
    at_once = max(1, lm.budget.tokens // len(whole.ids))
    with lm.evaluating(), lm.computing():
        for start in range(0, len(asked), at_once):
            batch = collate(asked[start : start + at_once], lm.pad_id, lm.device)
            states, _ = forward(batch)
            assert states is not None
            values = map_logits(lm.head, states, batch.targets, _entropy, lm.vocabulary)
            sums = scatter(values, batch.answer_mask).sum(dim=1)
            entropies += (sums / batch.answer_mask.sum(dim=1)).tolist()
    before, *after = entropies
    left = iter(after)
    return torch.tensor([
        next(left) - before if len(one.ids) > one.start else torch.inf for one in shorter
    ])  # fmt: skip


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def important(
    lm: LM, rows: Sequence[Row], share: float, how: Importance, stage: Stage
) -> dict[str, Tensor]:
    """Which tokens of rows matter, as ``important.KEY`` by row: at most a share of its own ones."""
    found: dict[str, Tensor] = {}
    each = ([row] for row in rows)
    for (row,) in watched(each, f"important tokens of {len(rows)} rows", len(rows), stage):
        if f"important.{row.key}" in found:
            continue
        if how == "content":
            marked = content_tokens(row, share)
        else:
            own = own_tokens(row)
            count = max(1, int(share * len(own)))
            order = entropy_changes(lm, row, own).argsort(descending=True, stable=True)
            marked = torch.zeros(len(row.encoded.ids), dtype=torch.bool)
            marked[[own[place] for place in order[:count].tolist()]] = True
        found[f"important.{row.key}"] = marked
    return found


# ---- where attention should be


def shifted(
    attention: Float[Tensor, "rows heads query key"],
    marked: Bool[Tensor, "rows key"],
    change: float,
) -> Float[Tensor, "rows heads query key"]:
    """Attention with weights of marked keys times 1 + ``change``, each query's sum 1 again.

    Args:
        change: -1 or more; a query that would be left without any weight stays as it was.
    """
    changed = attention * (1 + change * marked[:, None, None])
    total = changed.sum(dim=3, keepdim=True)
    found = torch.where(total > 0, changed, attention)
    return found / found.sum(dim=3, keepdim=True).clamp(min=1e-30)


def divergence(
    attention: Float[Tensor, "rows heads query key"],
    target: Float[Tensor, "rows heads query key"],
    positions: Bool[Tensor, "rows query"],
) -> Float[Tensor, " rows"]:
    """KL(attention || target), mean over heads, summed over queries; in nats."""
    # a query of padding may hold anything
    real = positions[:, None, :, None]
    own = torch.where(real, attention.float(), 0.0)
    wanted = torch.where(real, target.float(), 0.0)
    terms = own * ((own + TINY).log() - (wanted + TINY).log())
    return terms.sum(dim=(2, 3)).mean(dim=1)


def shift_loss(
    group: Group, loss: str, change: float, layers: Sequence[int]
) -> Float[Tensor, " rows"]:
    """Mean over layers of how far attention is from the reference's, shifted (see above).

    Args:
        loss: Full name of the loss that has learned which tokens matter.
    """
    width = group.positions.shape[1]
    marked = torch.zeros(group.positions.shape, dtype=torch.bool, device=group.positions.device)
    for place, row in enumerate(group.rows):
        one = group.reference.learned(loss, f"important.{row.key}")
        marked[place, : len(one)] = one
    found = []
    for layer in layers:
        target = shifted(group.reference.attention(layer, width), marked, change)
        found.append(divergence(group.attention(layer), target, group.positions))
    return torch.stack(found).mean(dim=0)
