"""Which experts some rows use most.

    s_i = mean over rows of mean over tokens of g_i        g_i: weight of expert i for the token

for every expert of every block, with g_i = 0 where the router does not choose it. Tokens are those
that predict a token of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.body import numbers
from delible.lm.experts import mixtures, routing
from delible.lm.forward import Forward, collate
from delible.lm.lm import LM
from delible.train.batches import FORWARD_BUDGET, batches
from delible.train.randomness import generator, shuffled
from delible.train.row import Row
from delible.watching import Stage, unwatched, watched


def sample(rows: Sequence[Row], tokens: int, seed: int) -> list[Row]:
    """Random rows, so many that they have at least so many tokens; all, if there are fewer."""
    found: list[Row] = []
    total = 0
    for row in shuffled(rows, generator(seed, "expert_choice")):
        if total >= tokens:
            break
        found.append(row)
        total += len(row.encoded.ids)
    return found


@torch.no_grad()
def affinity(
    lm: LM, rows: Sequence[Row], stage: Stage = unwatched
) -> dict[int, Float[Tensor, " experts"]]:
    """s of each expert by layer, float64, 0 or more.

    A layer's sum is 1 where routers make the weights of chosen experts sum to 1, and the mean mass
    of those that are chosen otherwise.

    Raises:
        ModelError: The model is dense, or its routers cannot be read.
    """
    layers = mixtures(lm.core, lm.anatomy)
    counts = numbers(lm.core.config.get_text_config(), "num_experts_per_tok")
    sums = {layer: torch.zeros(one.experts, dtype=torch.float64) for layer, one in layers.items()}
    parts = watched(
        batches(lm, rows, FORWARD_BUDGET), f"experts of {len(rows)} rows", len(rows), stage
    )
    with lm.evaluating(), lm.computing():
        for part in parts:
            encoded = [rows[place].encoded for place in part]
            batch = replace(collate(encoded, lm.pad_id, lm.device), prefix=0)
            top = max(counts) if counts else None
            with routing(lm.core, lm.anatomy, list(layers), top) as seen:
                Forward(lm)(batch)
            for layer, weights in seen.items():
                each = weights.double().view(*batch.ids.shape, -1).cpu()
                for row, values in zip(encoded, each, strict=True):
                    sums[layer] += values[row.start - 1 : len(row.ids) - 1].mean(dim=0)
    return {layer: total / max(1, len(rows)) for layer, total in sums.items()}


def chosen(
    scores: dict[int, Float[Tensor, " experts"]],
    count: int,
    *,
    within_layer: bool = False,
    layers: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """(layer, expert) of the largest scores, the largest first; ties: the first layer, expert.

    Args:
        within_layer: All of them in the layer of the first one.
        layers: Only there.
    """
    ranked = sorted(
        (-float(score), layer, expert)
        for layer, values in scores.items()
        if layers is None or layer in layers
        for expert, score in enumerate(values.tolist())
    )
    found = [(layer, expert) for _, layer, expert in ranked]
    if within_layer and found:
        found = [one for one in found if one[0] == found[0][0]]
    return found[:count]
