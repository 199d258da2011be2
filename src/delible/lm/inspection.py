"""White-box values of answers: whole distributions, hidden states, gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from delible.lm.body import Body
from delible.lm.forward import Batch, Forward, collate, map_logits, target_logprobs
from delible.lm.template import Encoded
from delible.system.asks import GradientNorm, Hidden, Inspection

Values = npt.NDArray[np.float32]


def inspect(lm: Body, requests: Sequence[Inspection], rows: Sequence[Encoded]) -> list[Values]:
    """Answers to requests of one kind; ``rows`` are their tokens."""
    first = requests[0]
    if isinstance(first, GradientNorm):
        orders = [cast(GradientNorm, request).order for request in requests]
        return [gradient_norm(lm, row, order) for row, order in zip(rows, orders, strict=True)]
    layer = first.layer if isinstance(first, Hidden) else None
    found: list[Values | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids), reverse=True)
    with torch.inference_mode():
        for indices in lm.batches(order, [len(row.ids) for row in rows]):
            batch = collate([rows[index] for index in indices], lm.pad_id, lm.device)
            parts = _distributions(lm, batch) if layer is None else _states(lm, batch, layer)
            for index, part in zip(indices, parts, strict=True):
                found[index] = part
    return [one for one in found if one is not None]


def _distributions(lm: Body, batch: Batch) -> list[Values]:
    states, _ = Forward(lm)(batch)
    counts = (batch.lengths - batch.starts).tolist()
    return [lm.head(part).float().log_softmax(dim=1).cpu().numpy() for part in states.split(counts)]


def _states(lm: Body, batch: Batch, layer: int) -> list[Values]:
    block = Forward(lm)(batch, (layer,), final=False)[1][layer]
    spans = zip(block, batch.starts.tolist(), batch.lengths.tolist(), strict=True)
    return [row[start - 1 : end - 1].float().cpu().numpy().copy() for row, start, end in spans]


def gradient_norm(lm: Body, row: Encoded, order: float) -> Values:
    """Mean over parameter tensors of the norm of their gradient, shape [1].

    Of the mean loss over the answer's tokens, the end-of-turn token left out. One row at a time:
    the norm of a batch's gradient is not made of its rows' norms.
    """
    parameters = [one for one in lm.model.parameters() if one.is_floating_point()]
    wanted = [one.requires_grad for one in parameters]
    batch = collate([row], lm.pad_id, lm.device)
    kept = max(1, row.answer_tokens - int(row.has_end))
    try:
        with torch.enable_grad():
            for one in parameters:
                one.requires_grad_(True)
            states, _ = Forward(lm)(batch)
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
            gradients = torch.autograd.grad(-values[:kept].mean(), parameters, allow_unused=True)
    finally:
        for one, before in zip(parameters, wanted, strict=True):
            one.requires_grad_(before)
    norms = [
        float(torch.linalg.vector_norm(one.float(), order)) for one in gradients if one is not None
    ]
    return np.array([np.mean(norms)], np.float32)
