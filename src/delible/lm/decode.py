"""Generation in batches: the shared prompt once, and rows that are finished leave the batch.

Prompts are read one after the other in one row, without padding, and their keys and values are
then laid out row by row (a model that cannot do that reads them as a padded batch).
One step costs as much as the rows that are still speaking. A row that has ended, or has said one
of the stop texts, is dropped together with its keys and values; answers are cut before a stop
text. Drawing is done per row with numbers that depend on the seed and the prompt alone, so that
a batch's make-up cannot change an answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from delible.lm.attention import attention_window, token_by_token
from delible.lm.forward import cache_argument, fill_prefix
from delible.lm.tree import Prefix, Tree, node_states
from delible.measure.requests import Decoding

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Tokens by which a full cache grows at once: growing copies it.
ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room behind them, so that tokens come and rows go without a copy."""

    room: list[Tensor] | None = None
    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, width]; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        wanted = length + key_states.shape[2]
        if self.room is None or wanted > self.room[0].shape[2]:
            states = zip((self.keys, self.values), (key_states, value_states), strict=True)
            self.room = [_roomy(old if length else new[:, :, :0], wanted) for old, new in states]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:wanted] = new
        self.keys, self.values = (room[:, :, :wanted] for room in self.room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at these places; moves only those that are elsewhere."""
        if self.room is None or len(indices) > len(self.room[0]):
            super().batch_select_indices(indices)
            self.room = None
            return
        places = torch.arange(len(indices), device=indices.device)
        moved = places[indices != places]
        for room in self.room:
            room[moved] = room[indices[moved]]
        self.room = [room[: len(indices)] for room in self.room]
        length = self.get_seq_length()
        self.keys, self.values = (room[:, :, :length] for room in self.room)


def _roomy(states: Tensor, wanted: int) -> Tensor:
    batch, heads, length, width = states.shape
    room = states.new_empty(batch, heads, wanted + ROOM, width)
    room[:, :, :length] = states
    return room


def roomy_cache(lm: LM) -> DynamicCache:
    """An empty key-value cache; layers that keep only a window stay the library's."""
    cache = DynamicCache(config=lm.core.config.get_text_config())
    cache.layers = [RoomyLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def read_prompts(
    lm: LM, rows: Sequence[Sequence[int]], mask: Int[Tensor, "batch sequence"], cache: Any
) -> Float[Tensor, "batch hidden"]:
    """Fills an empty cache with the rows' keys and values; returns the last hidden states.

    Args:
        rows: Token ids; at least one each.
        mask: Where in the cache each row's tokens belong.
    """
    prefix = Prefix.of(rows)
    before = len(prefix.ids)
    trees = [Tree.grow(row[before:], []) for row in rows]
    states, parts = [], list[Any]()
    for places in lm.filled([len(tree.ids) for tree in trees]):
        packed = prefix.cache(lm)
        sizes = torch.tensor([len(trees[place].ids) for place in places], device=mask.device)
        ends = sizes.cumsum(0)
        states.append(node_states(lm, prefix, [trees[place] for place in places], packed)[ends - 1])
        # the packed position of a row's n-th token: the prefix, and then its own part
        nth = (mask[places].cumsum(1) - 1).clamp(min=0)
        own = (ends - sizes)[:, None] + nth
        parts.append((packed, torch.where(nth < before, nth, own)))
    for layer in range(len(parts[0][0].layers)):
        keys, values = (
            torch.cat([
                getattr(packed.layers[layer], name)[0][:, where].transpose(0, 1)
                for packed, where in parts
            ])
            for name in ("keys", "values")
        )  # fmt: skip
        cache.update(keys, values, layer)
    return torch.cat(states)


def continue_rows(
    lm: LM,
    rows: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[str],
    tell: Callable[[int], None] = lambda rows: None,
) -> list[str | None]:
    """The texts that follow token ids, one per row; ``None`` where logits are not numbers.

    Args:
        rows: Token ids of the prompts; they go through the model as one batch.
        seeds: What a row's random numbers depend on (unused when greedy).
        tell: Called with the rows' worth of work that was done since the last call.
    """
    padded, mask, shared = lm.padded(rows)
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    takes_positions = "position_ids" in signature(type(backbone).forward).parameters
    cache: Any = roomy_cache(lm)

    def following(fed: Tensor) -> Float[Tensor, "batch hidden"]:
        extra: dict[str, Any] = {cache_argument(backbone): cache}
        if takes_positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        found = backbone(input_ids=fed, attention_mask=mask, use_cache=True, **extra)
        return found.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    if lm.grows_trees and attention_window(lm) == math.inf:
        states = read_prompts(lm, rows, mask, cache)
    else:
        if shared:
            fill_prefix(lm, cache, padded[:, :shared])
        states = following(padded[:, shared:])
    draws = [random.Random(seed) for seed in seeds]
    said: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    done, broken = set[int](), set[int]()
    told = 0
    for step in range(decoding.max_new_tokens):
        logits = lm.head(states).float()
        numbers = logits.amax(dim=1).isfinite().tolist()  # the largest of NaNs is NaN
        tokens = _choose(logits, decoding, [draws[row] for row in alive])
        for row, token, fine in zip(alive, tokens, numbers, strict=True):
            if not fine:
                broken.add(row)
                done.add(row)
            if row not in done:
                ended = token in lm.ends
                if not ended:
                    said[row].append(token)
                if ended or _stops(lm, said[row], decoding.stop):
                    done.add(row)
        worth = len(done) + (len(rows) - len(done)) * (step + 1) // decoding.max_new_tokens
        if worth > told:
            tell(worth - told)
            told = worth
        if len(done) == len(rows) or step == decoding.max_new_tokens - 1:
            break
        kept = _closed_up([row not in done for row in alive])
        if lm.shares_prefix and len(kept) < len(alive):
            places = torch.tensor(kept, device=mask.device)
            cache.batch_select_indices(places)
            mask, alive = mask[places], [alive[place] for place in kept]
            tokens = [tokens[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        with token_by_token(lm):
            states = following(torch.tensor(tokens, device=mask.device)[:, None])
    return [
        None if row in broken else _text(lm, ids, decoding.stop) for row, ids in enumerate(said)
    ]


def _closed_up(stays: Sequence[bool]) -> list[int]:
    """Places of those that stay, the last ones moved to where one leaves."""
    staying = [place for place, one in enumerate(stays) if one]
    last = iter(reversed(staying))
    return [place if stays[place] else next(last) for place in range(len(staying))]


def _choose(
    logits: Float[Tensor, "batch vocab"], decoding: Decoding, draws: Sequence[random.Random]
) -> list[int]:
    if decoding.temperature == 0:
        return [int(token) for token in logits.argmax(dim=1)]
    shares = (logits.double() / decoding.temperature).softmax(dim=1)
    ordered, tokens = shares.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    ordered = ordered.masked_fill(before >= decoding.top_p, 0.0)
    sums = ordered.cumsum(dim=1)
    wanted = sums.new_tensor([draw.random() for draw in draws])[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
    return [int(token) for token in tokens.gather(1, places)[:, 0]]


def _stops(lm: LM, ids: Sequence[int], stop: Sequence[str]) -> bool:
    if not stop:
        return False
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    return any(one in text for one in stop)


def _text(lm: LM, ids: list[int], stop: Sequence[str]) -> str:
    text = str(lm.tokenizer.decode(ids, skip_special_tokens=True))
    for one in stop:
        text = text.partition(one)[0]
    return text.strip()
