"""How many tokens go through a model at once when nothing is trained: measured at the start.

More tokens per batch than the device needs to be busy bring nothing, so there is an upper end;
below it the free memory decides.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import psutil
import torch

from delible.lm.body import Body, Budget, widest
from delible.precision import is_out_of_memory

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Padded tokens per forward pass beyond which a device gets no faster.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 32768}
#: Rows that generate together at most (each step reads all weights once for all of them).
ENOUGH_ROWS = {"cpu": 192, "cuda": 1024}
#: Share of the free memory that a batch may take.
MEMORY_SHARE = 0.25
#: Tokens at once below which halving them makes no room.
LEAST_TOKENS = 64


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def measure_budget(lm: Body) -> Budget:
    """The budget of a model with the memory that is free now."""
    device, anatomy = lm.device, lm.anatomy
    config = lm.core.config.get_text_config()
    width = anatomy.hidden_size
    heads = widest(config, "num_attention_heads") or 1
    key_heads = widest(config, "num_key_value_heads") or heads
    head_width = widest(config, "head_dim") or width // heads
    cached = 2 * 4 * anatomy.layers * key_heads * head_width
    # without a graph one block's activations are alive at a time, besides keys and values
    passing = cached + 4 * (8 * width + 4 * lm.inner_width)
    free = MEMORY_SHARE * free_memory(device)
    kind = device.type if device.type in ENOUGH_TOKENS else "cuda"
    return Budget(
        tokens=max(64, min(ENOUGH_TOKENS[kind], int(free / passing))),
        # growing a cache copies it, so twice its size is needed for a moment
        cached_tokens=max(64, int(free / (2 * cached))),
        rows=ENOUGH_ROWS[kind],
    )


def until_it_fits(lm: Any, work: Callable[[], T]) -> T:
    """What some work over batches gives; where memory runs out, again with half as much at once.

    Args:
        lm: The model, whose budget the work asks for. It stays as small afterwards. If its weights
            are spread over processes nothing is done again: the others would not take part.
        work: Can be done again from its start.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            smallest = lm.budget.tokens <= LEAST_TOKENS
            if not is_out_of_memory(error) or smallest or lm.sharded is not None:
                raise
        # outside of the handler: what failed, and all that it held, is gone
        now: Budget = lm.budget
        vars(lm)["budget"] = replace(
            now,
            tokens=now.tokens // 2,
            cached_tokens=max(LEAST_TOKENS, now.cached_tokens // 2),
            rows=max(1, now.rows // 2),
        )
        logger.warning(f"Out of memory: continuing with {lm.budget.tokens} tokens at once.")
        make_room()


def make_room() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
