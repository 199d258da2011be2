"""Retain rows of on-policy steps: drawn anew for each, learned in the same update.

    loss = - sum over rows and answer tokens of log p / answer tokens of the step

p is the model's own, at a temperature of 1: that of the draws has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.randomness import generator
from delible.train.row import Row
from delible.train.rows import make_rows


class Retained:
    """The rows of every step.

    Args:
        lm: The model.
        rows: To draw from.
        count: Of a step.
        seed: Of the draws.
    """

    def __init__(self, lm: LM, rows: Sequence[Row], count: int, seed: int) -> None:
        self.lm, self.all, self.count, self.seed = lm, list(rows), count, seed

    @classmethod
    def of(
        cls, lm: LM, records: Sequence[RecordBase], settings: OnPolicyTraining, seed: int
    ) -> Retained | None:
        """The rows of a run; None where nothing is learned beside.

        Raises:
            RecipeError: A weight is given and there are no retain records.
        """
        if not settings.retain_weight:
            return None
        if not records:
            raise RecipeError(
                "there are no retain records, and retain_weight is above 0.",
                where="on-policy training",
                hint="Add --retain FILE, or set retain_weight to 0.",
            )
        rows = make_rows(lm.template, records, role="retain")
        return cls(lm, rows, min(settings.retain_rows, len(rows)), seed)

    def of_step(self, step: int) -> list[Row]:
        """The rows of one step, without repetition."""
        order = torch.randperm(len(self.all), generator=generator(self.seed, "retain", step))
        return [self.all[place] for place in order[: self.count].tolist()]

    def loss(self, step: int, number: int, count: int) -> Tensor | None:
        """The share of pass ``number`` of ``count`` in a step's loss; None if it has no row."""
        every = self.of_step(step)
        mine = [row.encoded for row in every[number::count]]
        if not mine:
            return None
        total = sum(row.encoded.answer_tokens for row in every)
        batch = collate(mine, self.lm.pad_id, self.lm.device)
        with self.lm.computing():
            states, _ = Forward(self.lm)(batch)
            logprobs = map_logits(
                self.lm.head, states, batch.targets, target_logprobs, self.lm.vocabulary
            )
        return -logprobs.sum() / max(1, total)


__all__ = ["Retained"]
