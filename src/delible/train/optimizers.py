"""The optimiser of a run."""

from __future__ import annotations

from typing import Any

import torch

from delible.train.recipe import Training
from delible.train.slots import Placement


def make_optimizer(training: Training, placement: Placement) -> torch.optim.Optimizer:
    """AdamW or plain descent over what moves; vectors do not decay."""
    # with masks the engine decays by hand, so that frozen entries stay where they are
    decay = 0.0 if placement.masks and placement.masked_decay else training.weight_decay
    matrices = [value for value in placement.parameters.values() if value.ndim >= 2]
    vectors = [value for value in placement.parameters.values() if value.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
