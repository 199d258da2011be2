"""Relearning: a few steps of fine-tuning on a copy of the model, to see what comes back.

Knowledge that is only hidden returns faster than it could be learned. The rows are some of the
forget rows (then the leak is measured on the *other* ones, about which these say nothing), or
retain rows, or rows about nothing that was forgotten, which cannot teach it at all: neutral texts
("unrelated"), or two harmless tasks ("benign": sums, and whether a review is good).

    T, V = split of the forget rows by fact;  theta' = AdamW(theta, mean of -log p(T));  leak on V

The split (``train/splits.py``) depends on the rows and the seed only: it is the same for all
systems. Unrelated and benign rows must not have eight words in a row with a forget row.

Beside the leak of the end, the audit draws the curve over the steps, and reads the speed of
relearning off it (``audit/relearning_speed.py``).

Papers: arXiv 2403.03218 (relearning as a test), arXiv 2406.13356 (rows that are loosely related),
arXiv 2409.18025 (few unrelated rows; LoRA of rank 128, alpha 16 and rate 2e-4), arXiv 2510.07626
(rate 1e-5, up to 100 steps; benign tasks). Reference code: github.com/ethz-spylab.
Deviations: forget rows are split, where these papers test what they trained; the loss is on
answer tokens, and padding is never part of it; the rate is constant after the warm-up; full
fine-tuning takes the rate 2e-5 of github.com/locuslab/open-unlearning's stress test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.measure.overlap import RUN, repeating
from delible.records import RecordBase
from delible.registry import register
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.splits import split_by_fact
from delible.train.tuning import FineTuning
from delible.world import benign

RowsFrom = Literal["forget", "unrelated", "retain", "benign"]
#: Peak learning rate where the option leaves it open.
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
FLAGS = {"forget": "--forget", "retain": "--retain", "unrelated": "--unrelated"}
#: Steps of the longest run of the sheet.
LONG = 100


@register(
    kind="attack",
    name="relearn",
    title="Relearning",
    summary="Fine-tunes a copy for a few steps and asks about facts that it was not trained on.",
    paper="2403.03218",
    year=2024,
    family="relearning",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="quick",
    badges=("variant",),
    variant="Judged on facts that were not trained on; AdamW; the loss on answer tokens only.",
)
class Relearn(ModelAttack):
    """Options of relearning."""

    rows: RowsFrom = Field("forget", description="Which rows the copy is trained on.")
    examples: int = Field(
        0, ge=0, description="Take only so many of these rows, drawn by the seed; 0: all."
    )
    adapter: Literal["full", "lora"] = Field(
        "full", description="Train all weights, or a low-rank adapter that is merged at the end."
    )
    rank: int = Field(128, ge=1, description="Rank of the adapter (lora).")
    alpha: float = Field(16.0, gt=0, description="Scale of the adapter times its rank (lora).")
    steps: int = Field(20, ge=1, description="Optimiser steps.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak rate of AdamW; by default 2e-5 (full), 2e-4 (lora)."
    )
    batch_size: int = Field(4, ge=1, description="Rows per optimiser step.")
    share: float = Field(
        0.5, gt=0, lt=1, description="Fraction of the forget rows to train on (rows: forget)."
    )
    observe_steps: int = Field(5, ge=1, description="Measure the curve after this many steps.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Forget rows for a moment; then longer, an adapter and unrelated rows; then the sweep."""
        half = max(1, self.steps // 2)
        if depth == "quick":
            return ({"rows": "forget", "adapter": "full", "steps": half},)
        standard: tuple[Mapping[str, object], ...] = (
            {"rows": "forget", "adapter": "full"},
            {"rows": "forget", "adapter": "lora"},
            {"rows": "unrelated", "adapter": "full", "steps": half},
        )
        if depth == "standard":
            return standard
        return (
            *standard,
            {"rows": "benign", "adapter": "full", "steps": half},
            {"rows": "retain", "adapter": "full"},
            {"rows": "unrelated", "adapter": "lora", "examples": 10, "steps": 30, "batch_size": 1},
            {"rows": "forget", "adapter": "full", "learning_rate": 1e-5, "steps": LONG},
            {"rows": "forget", "adapter": "full", "learning_rate": 1e-4},
        )

    def variant_title(self) -> str:
        """Such as "LoRA, unrelated rows, 20 steps"."""
        kind = "LoRA" if self.adapter == "lora" else "full"
        few = f"{self.examples} " if self.examples else ""
        rate = "" if self.learning_rate is None else f", rate {self.learning_rate:g}"
        return f"{kind}, {few}{self.rows} rows, {self.steps} step{'s' * (self.steps > 1)}{rate}"

    @property
    def control(self) -> bool:
        """Benign tasks show what any fine-tuning does."""
        return self.rows == "benign"

    def budget(self, context: AttackContext) -> Budget:
        """Its steps."""
        return Budget(steps=self.steps)

    def trained_on(self, context: AttackContext) -> Sequence[RecordBase]:
        """The rows of the fine-tuning.

        Raises:
            DataError: There are none, the forget rows cannot be split, or rows that are to say
                nothing of them repeat them.
        """
        rows: Sequence[RecordBase] = (
            benign() if self.rows == "benign" else getattr(context, self.rows)
        )
        if not rows:
            raise DataError(
                f"there are no {self.rows} rows to relearn from.",
                where="attack 'relearn'",
                hint=f"Add {FLAGS[self.rows]} FILE, or choose other rows (rows: …).",
            )
        if self.rows in ("unrelated", "benign") and (same := repeating(rows, context.forget)):
            raise DataError(
                f"{len(same)} {self.rows} rows have {RUN} words in a row that a forget row has, "
                "so they would teach it.",
                where="attack 'relearn'",
                hint="Choose other rows (rows: …).",
            )
        if self.rows == "forget":
            rows = split_by_fact(rows, self.share, context.seed)[0]
        if 0 < self.examples < len(rows):
            drawn = torch.randperm(
                len(rows), generator=generator(context.seed, "relearn.examples")
            ).tolist()
            rows = [rows[place] for place in sorted(drawn[: self.examples])]
        return rows

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """V for forget rows; otherwise all forget rows, since none was trained on.

        Raises:
            DataError: The forget rows cannot be split.
        """
        if self.rows == "forget":
            return split_by_fact(context.forget, self.share, context.seed)[1]
        return context.forget

    def left_out(self, context: AttackContext) -> int:
        """Forget rows that are neither trained on nor judged, as they tell facts of both sides."""
        sides = split_by_fact(context.forget, self.share, context.seed)
        return len(context.forget) - sum(map(len, sides))

    @property
    def tuning(self) -> FineTuning:
        """The fine-tuning."""
        return FineTuning(
            self.steps,
            self.learning_rate or LEARNING_RATES[self.adapter],
            self.batch_size,
            self.rank if self.adapter == "lora" else None,
            self.alpha,
        )

    def recipe(self, lm: LM, rows: int) -> Recipe:
        """The fine-tuning as a recipe of the training engine."""
        return self.tuning.recipe(lm, rows)

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The fine-tuned copy, an ordinary model also after LoRA.

        Raises:
            DataError: There are no rows, or they cannot be split.
            RunError: Training collapsed or moved nothing.
        """
        rows = self.trained_on(context)

        def watch(twin: LM, step: int, total: int) -> None:
            if context.observe and (step % self.observe_steps == 0 or step == total):
                context.observe(twin, step)
            if context.progress is not None and step:
                context.progress(step, total)

        tuned = self.tuning.tuned(lm, rows, context.seed, watch)
        context.notes["relearning_rows"] = len(rows)
        if self.rows == "forget" and (out := self.left_out(context)):
            context.notes["note"] = (
                f"{out} forget row{'s' * (out > 1)} tell{'s' * (out == 1)} facts of both sides, "
                "trained and held out, and took no part."
            )
        context.notes["relearning_tokens"] = tuned.tokens
        context.notes["relearning_loss"] = list(tuned.losses)
        return tuned.lm
