"""Gradient checkpointing: a block keeps what it is given, and is computed again for its gradient.

PyTorch's checkpoint, block by block, for the time of a call. transformers' own switch works in
training mode alone and turns the key-value cache off: dropout would be on, and the beginning that
rows share would be computed once per row. Here a block is a function of its states and of the
keys and values that stand before them, so that a second computation finds the cache as the first
one did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from delible.errors import ModelError
from delible.lm.body import Body
from delible.lm.cores import cores_of

#: Stands for the cache among what a block is given.
_CACHE = object()
_HINT = "Leave out --gradient-checkpointing."


def check_recomputing(lm: Body) -> None:
    """Refuses a model whose blocks are more than functions of states, keys and values.

    Raises:
        ModelError: What it has beside them.
    """
    where = type(lm.core).__name__
    if lm.interveners is not None:
        raise ModelError(
            "blocks that interventions or a router change are not computed again.",
            where=where,
            hint=_HINT,
        )
    settings = [core.config.get_text_config() for core in cores_of(lm.core)]
    layers = [layer for one in settings for layer in DynamicCache(config=one).layers]
    own = all(isinstance(layer, DynamicLayer) for layer in layers)
    if not own or any(getattr(one, "num_kv_shared_layers", None) for one in settings):
        raise ModelError(
            "its blocks hand on more than states, keys and values of their own, so that they "
            "cannot be computed again.",
            where=where,
            hint=_HINT,
        )


@contextmanager
def recomputed(lm: Body) -> Iterator[None]:
    """Within it blocks that are called keep their inputs alone, and compute again for a gradient.

    The blocks are those that are there now (see :func:`hooks.truncated`). Hooks on a block act
    once, outside of it; hooks inside of one act in the second computation only if they are still
    there.
    """
    if not (lm.recomputes and torch.is_grad_enabled()):
        yield
        return
    blocks: Any = lm.core.get_submodule(lm.anatomy.blocks)
    before = [(block, vars(block).get("forward")) for block in blocks]
    for place, block in enumerate(blocks):
        block.forward = _twice(block.forward, place)
    try:
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _twice(once: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A block's forward, of which only the inputs are kept."""

    def forward(*given: Any, **named: Any) -> Any:
        caches = [one for one in (*given, *named.values()) if isinstance(one, DynamicCache)]
        if not caches:
            return checkpoint(once, *given, use_reentrant=False, **named)
        cache: Any = caches[0]
        now = cache.layers[place]
        # what a second computation starts from holds no tensors: they are inputs, like states
        bare, before = copy.copy(cache), copy.copy(now)
        bare.layers, before.keys, before.values = [], None, None
        first: list[Any] = [None]  # taken by the first computation, gone for the second

        def run(keys: Tensor | None, values: Tensor | None, *given: Any, **named: Any) -> Any:
            alone, layer = copy.copy(bare), copy.copy(before)
            layer.keys, layer.values = keys, values
            alone.layers = [*[None] * place, layer]
            if first:
                first[0] = layer
            own = [alone if one is _CACHE else one for one in given]
            called = {key: alone if one is _CACHE else one for key, one in named.items()}
            return once(*own, **called)

        given = tuple(_CACHE if one is cache else one for one in given)
        named = {key: _CACHE if one is cache else one for key, one in named.items()}
        found = checkpoint(run, now.keys, now.values, *given, use_reentrant=False, **named)
        cache.layers[place] = first.pop()
        return found

    return forward
