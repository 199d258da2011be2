"""Activation patching: what a model says when one layer's states come from another model.

Only tokens from the first patched one on are computed; what stands before them is in the key-value
cache, which no patch reaches. All layers go through together, a row for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.forward import cache_argument, map_logits, prefix_cache, target_logprobs
from delible.lm.hooks import steer
from delible.lm.layout import padded_rows, told
from delible.lm.lm import LM
from delible.lm.template import Encoded


@torch.no_grad()
def patched_logprobs(
    lm: LM, row: Encoded, first: int, end: int, states: Float[Tensor, "layer token hidden"]
) -> Float[Tensor, "row token"]:
    """log p of a text's tokens, natural log, on the CPU: unpatched, and with each layer patched.

    The output of block l is replaced, where the tokens are predicted, by another model's states
    there. Computed in the data type of the weights.

    Args:
        row: The text.
        first: The first of the tokens that are predicted; at least 1.
        end: Behind the last of them.
        states: For each block, states at the tokens from ``first - 1`` to ``end - 2``.

    Returns:
        First the row without a patch, then one for each layer.
    """
    begin = first - 1
    fits = lm.budget.tokens // (end - begin) if lm.shares_prefix else lm.budget.tokens // end
    size = max(1, min(fits, lm.budget.cached_tokens // end) - 1)
    plain: list[Tensor] = []
    found: list[Tensor] = []
    for start in range(0, len(states), size):
        layers = range(start, min(start + size, len(states)))
        values = _rows(lm, row, begin, end, layers, states)
        plain.append(values[:1])
        found.append(values[1:])
    return torch.cat([plain[0], *found])


def _rows(lm: LM, row: Encoded, begin: int, end: int, layers: range, states: Tensor) -> Tensor:
    count = 1 + len(layers)
    ids = torch.tensor([row.ids[: end - 1]], device=lm.device).expand(count, -1)
    shared = begin if lm.shares_prefix else 0
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    lengths = torch.full((count,), end - 1, device=lm.device)
    starts = torch.full((count,), min(row.start, end - 1), device=lm.device)
    options: dict[str, object] = {"use_cache": bool(shared)}
    with lm.evaluating():
        if shared:
            prompt = row.ids[: row.start]
            cache = prefix_cache(lm, ids[:, :shared], lambda: prompt)
            options[cache_argument(backbone)] = cache
        with told(lm, padded_rows(ids, lengths, starts, shared)), _patched(lm, layers, states):
            final = backbone(input_ids=ids[:, shared:], **options).last_hidden_state
    final = final[:, begin - shared :].reshape(-1, final.shape[-1])
    targets = torch.tensor(row.ids[begin + 1 : end], device=lm.device).repeat(count)
    values = map_logits(lm.head, final, targets, target_logprobs, lm.vocabulary)
    return values.reshape(count, -1).cpu()


@contextmanager
def _patched(lm: LM, layers: range, states: Tensor) -> Iterator[None]:
    """Within it the last tokens of row 1 + i have the given states behind block ``layers[i]``."""

    def put(place: int, layer: int, old: Tensor) -> Tensor:
        new = old.clone()
        new[1 + place, -states.shape[1] :] = states[layer].to(old)
        return new

    with ExitStack() as stack:
        for place, layer in enumerate(layers):

            def function(old: Tensor, place: int = place, layer: int = layer) -> Tensor:
                return put(place, layer, old)

            stack.enter_context(steer(lm.core, lm.anatomy.block_path(layer), function))
        yield
