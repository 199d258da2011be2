"""The preference loss that DPO, NPO and their kin share."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def preference_loss(margin: Tensor, beta: float) -> Tensor:
    """(2 / beta) * softplus(-beta * margin): (2 / beta) log 2 at margin 0, falling to 0.

    Args:
        margin: By how many nats the model prefers what it should, relative to the reference; of
            any shape.
        beta: Inverse temperature, above 0.
    """
    return (2 / beta) * softplus(-beta * margin)
