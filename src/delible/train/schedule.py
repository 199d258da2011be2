"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(schedule: Schedule, step: int, total: int, warmup: int) -> float:
    """Factor of the peak learning rate at ``step`` (from 0), in (0, 1].

    A linear warm-up over ``warmup`` steps, then constant, linear to 0 or half a cosine to 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warmup)
    if schedule == "linear":
        return left
    return 0.5 * (1 + math.cos(math.pi * (1 - left)))
