"""Generation in batches: the shared prompt once, and rows that are finished leave the batch.

One step costs as much as the rows that are still speaking. A row that has ended, or has said one
of the stop texts, is dropped together with its keys and values; answers are cut before a stop
text. Drawing is done per row with numbers that depend on the seed and the prompt alone, so that
a batch's make-up cannot change an answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from delible.lm.forward import cache_argument, fill_prefix
from delible.measure.requests import Decoding

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Finished rows are dropped once they are this share of the batch: dropping copies the cache.
DROP_SHARE = 0.125
#: Tokens by which a full cache grows at once: growing copies it.
ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room behind them, so that most tokens are written without a copy."""

    room: tuple[Tensor, Tensor] | None = None
    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, width]; returns all keys and values so far."""
        length = self.get_seq_length()
        if not length:
            return super().update(key_states, value_states, *args, **kwargs)
        wanted = length + key_states.shape[-2]
        if not self._fits(wanted):
            self.room = (_with_room(self.keys, wanted), _with_room(self.values, wanted))
        for room, new in zip(self.room or (), (key_states, value_states), strict=True):
            room[:, :, length:wanted] = new
        self.keys, self.values = (room[:, :, :wanted] for room in self.room or ())
        return self.keys, self.values

    def _fits(self, wanted: int) -> bool:
        """Whether the keys still lie in the room (rows that were dropped lie elsewhere)."""
        return (
            self.room is not None
            and wanted <= self.room[0].shape[2]
            and self.keys.data_ptr() == self.room[0].data_ptr()
            and self.keys.shape[0] == self.room[0].shape[0]
        )


def _with_room(states: Tensor, wanted: int) -> Tensor:
    batch, heads, length, width = states.shape
    room = states.new_empty(batch, heads, wanted + ROOM, width)
    room[:, :, :length] = states
    return room


def roomy_cache(lm: LM) -> DynamicCache:
    """An empty key-value cache; layers that keep only a window stay the library's."""
    cache = DynamicCache(config=lm.core.config.get_text_config())
    cache.layers = [RoomyLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def continue_rows(
    lm: LM, rows: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[str]
) -> list[str | None]:
    """The texts that follow token ids, one per row; ``None`` where logits are not numbers.

    Args:
        rows: Token ids of the prompts; they go through the model as one batch.
        seeds: What a row's random numbers depend on (unused when greedy).
    """
    padded, mask, shared = lm.padded(rows)
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    takes_positions = "position_ids" in signature(type(backbone).forward).parameters
    cache: Any = roomy_cache(lm)
    if shared:
        fill_prefix(lm, cache, padded[:, :shared])
    fed, draws = padded[:, shared:], [random.Random(seed) for seed in seeds]
    said: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    done, broken = set[int](), set[int]()
    for step in range(decoding.max_new_tokens):
        extra: dict[str, Any] = {cache_argument(backbone): cache}
        if takes_positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        states = backbone(input_ids=fed, attention_mask=mask, use_cache=True, **extra)
        logits = lm.head(states.last_hidden_state[:, -1]).float()
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
        if len(done) == len(rows) or step == decoding.max_new_tokens - 1:
            break
        kept = [place for place, row in enumerate(alive) if row not in done]
        if lm.shares_prefix and len(alive) - len(kept) >= max(1.0, DROP_SHARE * len(alive)):
            places = torch.tensor(kept, device=padded.device)
            cache.batch_select_indices(places)
            mask, alive = mask[places], [alive[place] for place in kept]
            tokens = [tokens[place] for place in kept]
        fed = torch.tensor(tokens, device=padded.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return [
        None if row in broken else _text(lm, ids, decoding.stop) for row, ids in enumerate(said)
    ]


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
