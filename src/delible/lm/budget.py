"""How many tokens go through a model at once when nothing is trained: measured at the start.

More tokens per batch than the device needs to be busy bring nothing, so there is an upper end;
below it the free memory decides.
"""

from __future__ import annotations

import psutil
import torch

from delible.lm.body import Body, Budget, widest

#: Padded tokens per forward pass beyond which a device gets no faster.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 32768}
#: Rows that generate together at most (each step reads all weights once for all of them).
ENOUGH_ROWS = {"cpu": 192, "cuda": 1024}
#: Share of the free memory that a batch may take.
MEMORY_SHARE = 0.25


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
