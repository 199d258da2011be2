"""What a model does with its head's logits: nothing, a factor, a soft limit, or both.

    logits = cap * tanh(scale * head(states) / cap)

Granite divides the logits, Cohere multiplies them, Gemma keeps them within a limit. Every family
has a name of its own for it, so it is not read but measured: the model's own logits are compared
with the head's for final states of known size. Very large ones show the limit, small ones the
factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm.body import AfterHead, Body, head_logits

#: Largest logit of the probe that looks for a limit; known limits are 15 to 50.
_LARGE = 1e5
#: Largest logit of the probe that measures the factor.
_SMALL = 4.0
#: Share of logits that are as large as the largest if there is a limit.
_MANY = 0.25


def measure(lm: Body, ids: Tensor) -> AfterHead:
    """The function that turns a model's head into its logits.

    Args:
        lm: The model.
        ids: Tokens that its final states are taken of, [batch, sequence].

    Raises:
        ModelError: It is none of those, or the head reads something else than the final states.
    """
    large, small = _probes(lm, ids)
    head, logits = small
    if head.shape == logits.shape:
        cap = _limit(*large)
        clear = logits.abs() < 0.9 * (cap or math.inf)
        plain = logits[clear] if cap is None else cap * torch.atanh(logits[clear] / cap)
        size = float(head[clear].square().sum())
        digits = torch.finfo(next(lm.core.parameters()).dtype).eps
        scale = float((head[clear] * plain).sum()) / size if size else 1.0
        scale = 1.0 if abs(scale - 1) < digits / 2 else scale
        found = AfterHead(_rounded(scale), cap) if scale > 0 else AfterHead()
        difference = float((found(head) - logits).abs().max())
        if difference <= max(1e-3, 4 * digits) * max(1e-3, float(logits.abs().max())):
            return found
        told = f"largest difference {difference:.3g}"
    else:
        told = f"{head.shape[-1]} and {logits.shape[-1]} logits"
    raise ModelError(
        f"body and head do not reproduce its logits ({told}).",
        where=type(lm.core).__name__,
        hint="Its architecture does something with the logits that is not known here.",
    )


def _probes(lm: Body, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The head's and the model's logits in float64, each [batch, sequence, vocab], of final states
    that are stretched so that the head's logits are large, and so that they are small.
    """
    backbone, head = lm.core.get_submodule(lm.anatomy.backbone), lm.core.get_output_embeddings()
    states = backbone(input_ids=ids, use_cache=False).last_hidden_state
    own = max(float(head_logits(head, states).abs().max()), 1e-6)
    factors = (_LARGE / own, _SMALL / own)

    def stretch(module: Any, inputs: Any, output: Any) -> Any:
        last = output.last_hidden_state
        output.last_hidden_state = torch.cat([last * factor for factor in factors], dim=1)
        return output

    hook = backbone.register_forward_hook(stretch)
    try:
        logits = lm.core(input_ids=ids, use_cache=False).logits.double()
    finally:
        hook.remove()
    parts = logits.split(ids.shape[1], dim=1)
    return [
        (head_logits(head, states * factor).double(), part)
        for factor, part in zip(factors, parts, strict=True)
    ]


def _limit(head: Tensor, logits: Tensor) -> float | None:
    """The soft limit, if many of the logits of very large states have one size."""
    largest = float(logits.abs().max())
    reached = (logits.abs() >= largest * (1 - 1e-4)).double().mean()
    if float(reached) < _MANY or largest >= float(head.abs().max()):
        return None
    return _rounded(largest)


def _rounded(value: float) -> float:
    """The short number, or one divided by a short number, that a measured value stands for."""
    for near in (float(f"{value:.4g}"), 1 / float(f"{1 / value:.4g}")):
        if abs(near / value - 1) < 2e-5:
            return near
    return value
