"""Generation in batches: the shared prompt once, and rows that are finished leave the batch.

Prompts are read one after the other in one row, without padding, and their keys and values are
then laid out row by row (a model that cannot do that reads them as a padded batch).
One step costs as much as the rows that are still speaking. A row that has ended, or has said one
of the stop texts, is dropped together with its keys and values; answers are cut before a stop
text. Drawing is done per row with numbers that depend on the seed and the prompt alone, so that
a batch's make-up cannot change an answer.

Which of these a model can do is tried when it is loaded (:mod:`delible.lm.checks`). One with a
state that padding, repeating or leaving rows would disturb (recurrent models, mostly) generates
row by row with the library's own ``generate``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from delible.lm.attention import attention_window, token_by_token
from delible.lm.forward import cache_argument, fill_prefix
from delible.lm.tree import Prefix, Tree, node_states
from delible.measure.requests import Decoding

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: How prompts are read and rows go on: packed without padding; in batches that share a beginning;
#: in batches whose rows stay to the end; each row alone, by the library's own ``generate``.
Road = Literal["trees", "prefix", "padded", "plain"]
#: From the fastest to the one that every model can take.
ROADS: tuple[Road, ...] = get_args(Road)
#: Next tokens, one per row that is left: (logits [rows, vocab], which rows, step) -> tokens.
Choose = Callable[[Tensor, list[int], int], list[int]]

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
    lm: LM, rows: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[str]
) -> list[str | None]:
    """The texts that follow token ids, one per row; ``None`` where logits are not numbers.

    Args:
        rows: Token ids of the prompts; they go through the model as one batch.
        seeds: What a row's random numbers depend on (unused when greedy).
    """
    draws = [random.Random(seed) for seed in seeds]

    def choose(logits: Tensor, alive: list[int], step: int) -> list[int]:
        return _choose(logits, decoding, [draws[row] for row in alive])

    said = say(lm, rows, decoding.max_new_tokens, choose, decoding.stop)
    return [None if ids is None else _text(lm, ids, decoding.stop) for ids in said]


def say(
    lm: LM,
    rows: Sequence[Sequence[int]],
    limit: int,
    choose: Choose,
    stop: Sequence[str] = (),
) -> list[list[int] | None]:
    """The tokens that follow each row, without its end; ``None`` where logits are not numbers.

    Args:
        limit: At most so many tokens.
        choose: Takes the next tokens.
        stop: Texts that end a row.
    """
    if lm.road == "plain":
        return [_say_alone(lm, row, place, limit, choose, stop) for place, row in enumerate(rows)]
    padded, mask, shared = lm.padded(rows, sharing=lm.road != "padded")
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    takes_positions = "position_ids" in signature(type(backbone).forward).parameters
    cache: Any = roomy_cache(lm)
    ends = lm.ends

    def following(fed: Tensor) -> Float[Tensor, "batch hidden"]:
        extra: dict[str, Any] = {cache_argument(backbone): cache}
        if takes_positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        found = backbone(input_ids=fed, attention_mask=mask, use_cache=True, **extra)
        return found.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    if lm.road == "trees" and lm.grows_trees and attention_window(lm) == math.inf:
        states = read_prompts(lm, rows, mask, cache)
    else:
        if shared:
            fill_prefix(lm, cache, padded[:, :shared])
        states = following(padded[:, shared:])
    said: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    done, broken = set[int](), set[int]()
    for step in range(limit):
        logits = lm.head(states).float()
        numbers = logits.amax(dim=1).isfinite().tolist()  # the largest of NaNs is NaN
        tokens = choose(logits, alive, step)
        for row, token, fine in zip(alive, tokens, numbers, strict=True):
            if not fine:
                broken.add(row)
                done.add(row)
            if row not in done:
                ended = token in ends
                if not ended:
                    said[row].append(token)
                if ended or _stops(lm, said[row], stop):
                    done.add(row)
        if len(done) == len(rows) or step == limit - 1:
            break
        kept = _closed_up([row not in done for row in alive])
        if lm.road != "padded" and lm.shares_prefix and len(kept) < len(alive):
            places = torch.tensor(kept, device=mask.device)
            cache.batch_select_indices(places)
            mask, alive = mask[places], [alive[place] for place in kept]
            tokens = [tokens[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        with token_by_token(lm):
            states = following(torch.tensor(tokens, device=mask.device)[:, None])
    return [None if row in broken else ids for row, ids in enumerate(said)]


@contextmanager
def plain_settings(lm: LM) -> Iterator[None]:
    """The library's generation without the samplers and ends that a model brings along."""
    before = lm.core.generation_config
    lm.core.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.core.generation_config = before


def _say_alone(
    lm: LM, row: Sequence[int], place: int, limit: int, choose: Choose, stop: Sequence[str]
) -> list[int] | None:
    """What :func:`say` gives for one row, by the library's own generation."""
    said: list[int] = []
    ends = lm.ends
    ended = broken = False

    def forced(ids: Tensor, logits: Tensor) -> Tensor:
        nonlocal ended, broken
        token = choose(logits.float(), [place], int(ids.shape[1]) - len(row))[0]
        broken = not bool(logits.amax().isfinite())
        ended = broken or token in ends
        if not ended:
            said.append(token)
        only = torch.full_like(logits, -math.inf)
        only[0, token] = 0.0
        return only

    def stopped(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor([ended or _stops(lm, said, stop)], device=ids.device)

    ids = torch.tensor([list(row)], device=lm.device)
    with plain_settings(lm):
        lm.core.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=lm.pad_id,
            logits_processor=LogitsProcessorList([forced]),
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
    return None if broken else said


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
