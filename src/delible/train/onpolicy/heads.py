"""Log-probabilities and entropies of completions alone: the head runs at their tokens only.

TRL's own head runs, without a GPU, at every position of every row, prompts and padding too; and it
keeps what the entropies' gradient would need. This one takes its place for a run, with the same
results.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from delible.lm.body import head_logits
from delible.lm.forward import map_logits
from delible.lm.lm import LM


def token_terms(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    temperature: float,
    with_gradient: bool,
) -> Float[Tensor, "tokens 2"]:
    """Log-probability of each target and entropy of its distribution, in nats.

    Args:
        with_gradient: The entropy has a gradient, too.
    """
    scaled = logits if temperature == 1 else logits / temperature
    sums = scaled.logsumexp(dim=1)
    own = scaled.gather(1, targets[:, None])[:, 0] - sums
    with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
        shares = (scaled - sums[:, None]).exp()
        entropy = sums - (shares * scaled).sum(dim=1)
    return torch.stack([own, entropy], dim=1)


def fused_forward(
    lm: LM, core: nn.Module, original: Callable[..., Any], temperature: float, entropies: bool
) -> Callable[..., Any]:
    """A forward of a causal model that TRL can ask for log-probabilities (``fused_lm_head``).

    Args:
        core: The model, or a copy of it.
        original: What it does when it is not asked for them.
        entropies: Whether the entropies' gradient is wanted.
    """
    backbone = core.get_submodule(lm.anatomy.backbone)

    def head(states: Tensor) -> Tensor:
        return lm.after_head(head_logits(core.get_output_embeddings(), states))  # type: ignore[operator]

    def terms(logits: Tensor, targets: Tensor) -> Tensor:
        return token_terms(logits, targets, temperature, entropies)

    def forward(*args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **given)
        labels = given.pop("labels")[:, 1:]
        states = backbone(*args, **{**given, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels != -100
        found = map_logits(head, states[mask], labels[mask], terms, lm.vocabulary)
        empty = found.new_zeros(mask.shape)
        return SimpleNamespace(
            log_probs=empty.masked_scatter(mask, found[:, 0]),
            entropy=empty.masked_scatter(mask, found[:, 1]),
            aux_loss=None,
        )

    return forward


__all__ = ["fused_forward", "token_terms"]
