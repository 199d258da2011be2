"""Which forget row meets which retain row in which step: made once, from the seed alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.row import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
        steps: For each optimiser step its pairs of a forget row and a retain row, as places in
            the lists of rows; ``None``: no retain row.
        steps_per_epoch: How many of them one pass over the forget rows takes.
    """

    steps: tuple[tuple[tuple[int, int | None], ...], ...]
    steps_per_epoch: int

    @property
    def retain_indices(self) -> set[int]:
        return {kept for step in self.steps for _, kept in step if kept is not None}


def make_plan(recipe: Recipe, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Plan:
    """The plan of a run: as many epochs as asked for, or more until there are enough steps."""
    training = recipe.training
    steps: list[tuple[tuple[int, int | None], ...]] = []
    per_epoch = 1
    least = training.least_steps or 0
    for epoch in count():
        if epoch >= training.epochs and (len(steps) >= least or not steps):
            break
        random = generator(seed, "sample", epoch)
        pairs = recipe.sample.epoch(forget, retain, epoch, random)
        size = training.batch_size
        chunks = [tuple(pairs[at : at + size]) for at in range(0, len(pairs), size)]
        repeated = [chunk for chunk in chunks for _ in range(recipe.harden.repeats())]
        per_epoch = len(repeated)
        steps += repeated
        if training.max_steps is not None and len(steps) >= training.max_steps:
            steps = steps[: training.max_steps]
            break
    if training.max_steps is not None and 0 < len(steps) < training.max_steps:
        logger.info(
            f"training: {epoch} passes over {len(forget)} forget rows are {len(steps)} steps, "
            f"fewer than the {training.max_steps} that are allowed; more --epochs are more steps."
        )
    return Plan(tuple(steps), per_epoch)
