"""Generation in batches: the shared prompt once, and rows that are finished leave the batch.

Prompts are read one after the other in one row, without padding, and their keys and values are
then laid out row by row (a model that cannot do that reads them as a padded batch).
One step costs as much as the rows that are still speaking. A row that has ended, or has said one
of the stop texts, is dropped together with its keys and values.

Which of these a model can do is tried when it is loaded (:mod:`delible.lm.checks`). One with a
state that padding, repeating or leaving rows would disturb (recurrent models, mostly) generates
row by row with the library's own ``generate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from delible.lm.adapters import each_its_own
from delible.lm.attention import attention_window, token_by_token
from delible.lm.body import Body
from delible.lm.forward import arguments_of, cache_argument, fill_prefix
from delible.lm.layout import Make, beside_padding, one_more, told, turn
from delible.lm.roomy import RoomyLayer, roomy_cache
from delible.lm.speaker import Choose, Row, choose_tokens, heard, said_by
from delible.lm.tree import Prefix, Tree, node_states
from delible.system.asks import Decoding


def read_prompts(
    lm: Body, rows: Sequence[Sequence[int]], mask: Int[Tensor, "batch sequence"], cache: Any
) -> Float[Tensor, "batch hidden"]:
    """Fills an empty cache with the rows' keys and values; returns the last hidden states.

    Args:
        rows: Token ids; at least one each.
        mask: Where in the cache each row's tokens belong.
    """
    prefix = Prefix.of(rows, lm)
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


class Speaking:
    """A batch that is continued token by token; rows join and leave between two steps.

    Args:
        lm: A model that can answer in batches (its road is not "plain").
        choose: Takes the next tokens; None: as each row's decoding says.
    """

    def __init__(self, lm: Body, choose: Choose | None = None) -> None:
        self.lm, self.choose = lm, choose or choose_tokens
        self.backbone = lm.core.get_submodule(lm.anatomy.backbone)
        self.takes_positions = "position_ids" in arguments_of(self.backbone)
        #: By place in the batch; where rows cannot leave, also those that have ended.
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask = self._states = torch.empty(0)

    @property
    def goes_on(self) -> bool:
        """Whether a row is still speaking."""
        return any(row.finish is None for row in self.rows)

    @property
    def takes_more(self) -> bool:
        """Whether rows can join now (into an empty batch always)."""
        if not self.rows:
            return True
        roomy = all(isinstance(layer, RoomyLayer) for layer in self._cache.layers)
        return roomy and self._lets_go

    @property
    def _lets_go(self) -> bool:
        """Whether rows can leave before the last one has ended."""
        return self.lm.shares_prefix and self.lm.road in ("trees", "prefix")

    def join(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> None:
        """Reads the prompts of rows that begin to speak; their adapter is on, see ``adapters.py``.

        Rows with the same prompt read it together, once.

        Args:
            rows: Of one adapter.
            prompts: Token ids, one sequence per row; they go through the model as one batch.
        """
        for row, prompt in zip(rows, prompts, strict=True):
            row.prompt = prompt
        road = self.lm.road
        sharing = self._may_share(rows, prompts)
        cache = roomy_cache(self.lm)
        prompts, places = self._each_once(prompts, cache)
        padded, mask, shared = self.lm.padded(prompts, sharing=sharing)
        if road == "trees" and self.lm.grows_trees and attention_window(self.lm) == math.inf:
            states = read_prompts(self.lm, prompts, mask, cache)
        else:
            if shared:
                fill_prefix(self.lm, cache, padded[:, :shared], lambda: prompts[0])
            fed = padded[:, shared:]
            layout = beside_padding(prompts, mask, fed.shape[1])
            states = self._following(fed, mask, cache, layout)
        if places is not None:
            chosen = torch.tensor(places, device=mask.device)
            cache.batch_select_indices(chosen)
            mask, states = mask[chosen], states[chosen]
        if self.rows:
            length = max(mask.shape[1], self._mask.shape[1])
            for layer, old in zip(cache.layers, self._cache.layers, strict=True):
                layer.lay(
                    *(
                        torch.cat([_behind(getattr(one, name), length) for one in (old, layer)])
                        for name in ("keys", "values")
                    )
                )
            masks = (self._mask, mask)
            mask = torch.cat([pad(one, (length - one.shape[1], 0)) for one in masks])
            states = torch.cat([self._states, states])
        self.rows, self._cache, self._mask, self._states = [*self.rows, *rows], cache, mask, states

    def _each_once(
        self, prompts: Sequence[Sequence[int]], cache: Any
    ) -> tuple[Sequence[Sequence[int]], list[int] | None]:
        """Different prompts, and which one each row has; None: every row reads its own."""
        different = {tuple(prompt): None for prompt in prompts}
        roomy = all(isinstance(layer, RoomyLayer) for layer in cache.layers)
        if len(different) == len(prompts) or not (roomy and self._lets_go):
            return prompts, None
        order = {prompt: place for place, prompt in enumerate(different)}
        return list(order), [order[tuple(prompt)] for prompt in prompts]

    def _may_share(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> bool:
        """Whether a beginning may stand before the padding.

        A window counts places, padding too: what stands behind the padding must still see it.
        """
        longest = max(map(len, prompts)) + max(row.decoding.max_new_tokens for row in rows)
        return self.lm.road != "padded" and longest <= attention_window(self.lm)

    def step(self) -> None:
        """One more token for every row that goes on; those that end leave."""
        logits = self.lm.head(self._states).float()
        numbers = logits.amax(dim=1).isfinite().tolist()  # the largest of NaNs is NaN
        tokens = self.choose(logits, self.rows)
        self.lm.spoken(self.rows, logits)
        for row, token, fine in zip(self.rows, tokens, numbers, strict=True):
            if row.finish is None:
                row.finish = heard(self.lm, row, token) if fine else "broken"
        if not self.goes_on:
            self.leave()
            return
        kept = self.leave()
        fed = torch.tensor([tokens[place] for place in kept], device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(kept), 1)], dim=1)
        layout = one_more(
            lambda: [row.prompt for row in self.rows],
            lambda: [len(row.said) for row in self.rows],
            self._mask.device,
            lambda: [row.doubt for row in self.rows],
        )
        adapters = each_its_own(self.lm, [row.adapter for row in self.rows])
        with turn(self.lm.core), token_by_token(self.lm), adapters:
            self._states = self._following(fed, self._mask, self._cache, layout)

    def leave(self) -> list[int]:
        """Takes rows that have a finish out; returns the places that stay, in their new order."""
        places = list(range(len(self.rows)))
        if not self.goes_on:
            self.rows, self._cache = [], None
            return []
        kept = _closed_up([row.finish is None for row in self.rows])
        if not self._lets_go or len(kept) == len(places):
            return places
        chosen = torch.tensor(kept, device=self._mask.device)
        self._cache.batch_select_indices(chosen)
        self._mask, self._states = self._mask[chosen], self._states[chosen]
        self.rows = [self.rows[place] for place in kept]
        return kept

    def _following(
        self, fed: Tensor, mask: Tensor, cache: Any, layout: Make
    ) -> Float[Tensor, "batch hidden"]:
        extra: dict[str, Any] = {cache_argument(self.backbone): cache}
        if self.takes_positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        with told(self.lm, layout):
            found = self.backbone(input_ids=fed, attention_mask=mask, use_cache=True, **extra)
        return found.last_hidden_state[:, -1]  # type: ignore[no-any-return]


def _behind(states: Float[Tensor, "batch heads sequence width"], length: int) -> Tensor:
    """Keys or values with nothing in front of them, as many as ``length`` in all."""
    return pad(states, (0, 0, length - states.shape[2], 0))


def continue_rows(
    lm: Body,
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
    speakers = [Row(decoding, seed) for seed in seeds]
    if decoding.max_new_tokens > 0:
        speak(lm, speakers, rows, tell=tell)
    return [
        None if row.finish == "broken" else said_by(lm, row.said, decoding.stop) for row in speakers
    ]


def speak(
    lm: Body,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    choose: Choose | None = None,
    tell: Callable[[int], None] = lambda rows: None,
) -> None:
    """Continues rows together until all have ended, on the road that the model can take."""
    if lm.road == "plain":
        for row, prompt in zip(rows, prompts, strict=True):
            _speak_alone(lm, row, prompt, choose or choose_tokens)
            tell(1)
        return
    speaking = Speaking(lm, choose)
    speaking.join(rows, prompts)
    steps = told = 0
    while speaking.goes_on:
        speaking.step()
        steps += 1
        worth = sum(_worth(row, steps) for row in rows)
        if int(worth) > told:
            tell(int(worth) - told)
            told = int(worth)


def _worth(row: Row, steps: int) -> float:
    """Which part of a row's work is done."""
    return 1.0 if row.finish else steps / row.decoding.max_new_tokens


@contextmanager
def plain_settings(lm: Body) -> Iterator[None]:
    """The library's generation without the samplers and ends that a model brings along."""
    before = lm.core.generation_config
    lm.core.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.core.generation_config = before


def _speak_alone(lm: Body, row: Row, prompt: Sequence[int], choose: Choose) -> None:
    """Continues one row by the library's own generation."""
    row.prompt = prompt

    def forced(ids: Tensor, logits: Tensor) -> Tensor:
        token = choose(logits.float(), [row])[0]
        lm.spoken([row], logits.float())
        row.finish = heard(lm, row, token) if bool(logits.amax().isfinite()) else "broken"
        only = torch.full_like(logits, -math.inf)
        only[0, token] = 0.0
        return only

    def stopped(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor([row.finish is not None], device=ids.device)

    ids = torch.tensor([list(prompt)], device=lm.device)
    layout = one_more(lambda: [prompt], lambda: [len(row.said)], lm.device, lambda: [row.doubt])
    with plain_settings(lm), told(lm, layout, lambda: len(row.said)):
        lm.core.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=row.decoding.max_new_tokens,
            do_sample=False,
            pad_token_id=lm.pad_id,
            logits_processor=LogitsProcessorList([forced]),
            stopping_criteria=StoppingCriteriaList([stopped]),
        )


def _closed_up(stays: Sequence[bool]) -> list[int]:
    """Places of those that stay, the last ones moved to where one leaves."""
    staying = [place for place, one in enumerate(stays) if one]
    last = iter(reversed(staying))
    return [place if stays[place] else next(last) for place in range(len(staying))]
