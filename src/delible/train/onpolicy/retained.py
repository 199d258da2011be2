"""Retain rows of on-policy steps: drawn anew for each, learned in the same update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.randomness import generator
from delible.train.row import Row
from delible.train.rows import make_rows

if TYPE_CHECKING:
    from delible.train.onpolicy.trl_adapter import Learned


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

    def rows(self, step: int, number: int, count: int) -> Learned | None:
        """The share of pass ``number`` of ``count``; None if it has none."""
        from delible.train.onpolicy.trl_adapter import Learned

        every = self.of_step(step)
        mine = [row.encoded for row in every[number::count]]
        if not mine:
            return None
        longest = max(len(row.ids) for row in mine)
        ids = torch.full((len(mine), longest), self.lm.pad_id)
        attention = torch.zeros_like(ids)
        mask = torch.zeros(len(mine), longest - 1)
        for place, row in enumerate(mine):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            attention[place, : len(row.ids)] = 1
            mask[place, row.start - 1 : len(row.ids) - 1] = 1
        total = sum(row.encoded.answer_tokens for row in every)
        device = self.lm.device
        return Learned(ids.to(device), attention.to(device), mask.to(device), total)


__all__ = ["Retained"]
