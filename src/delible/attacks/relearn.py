"""Relearning: a few steps of fine-tuning on a copy of the model, to see what comes back.

Knowledge that is only hidden returns faster than it could be learned. The rows are some of the
forget rows (then the leak is measured on the *other* ones, about which these say nothing), or
retain rows, or rows about nothing that was forgotten, which cannot teach it at all.

    T, V = split of the forget rows by fact;  theta' = AdamW(theta, mean of -log p(T));  leak on V

Rows of one fact (``measure/facts.py``) are all in T or all in V, and a text that tells facts of
both is in neither. The split depends on the rows and the seed only: it is the same for all
systems.

Papers: arXiv 2410.08827 (train on T, test on V), arXiv 2403.03218 (relearning as a test),
arXiv 2406.13356 (rows that are loosely related), arXiv 2409.18025 (unrelated rows; LoRA of rank
128, alpha 16 and rate 2e-4). Reference code: github.com/aghyad-deeb/unlearning_evaluation.
Deviations: one split by ``share`` and no rotation of folds; the loss is on answer tokens, and
padding is never part of it (the reference averages over padding too); AdamW instead of Lion;
full fine-tuning takes the rate 2e-5 of github.com/locuslab/open-unlearning's stress test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from delible.cards import Depth
from delible.context import Context
from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack
from delible.measure.facts import facts_of
from delible.records import RecordBase
from delible.registry import register
from delible.train.engine import Trainer
from delible.train.randomness import generator
from delible.train.recipe import Recipe

RowsFrom = Literal["forget", "unrelated", "retain"]
#: Peak learning rate where the option leaves it open.
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
#: Sides of the split.
TRAINED, HELD_OUT, NEITHER = "trained", "held out", "neither"
FLAGS = {"forget": "--forget", "retain": "--retain", "unrelated": "--unrelated"}


def split_by_fact(
    records: Sequence[RecordBase], share: float, seed: int
) -> tuple[list[RecordBase], list[RecordBase]]:
    """The rows to train on and the rows held out; disjoint in facts.

    A row that tells facts of both sides (a text about a person of whom single facts are asked) is
    on neither: as a training row it would teach what is held out, and held out it would be judged
    by what was trained.

    Args:
        records: Forget rows.
        share: Fraction of the rows to train on, in (0, 1); reached to within one fact.
        seed: Of the order in which facts are taken.

    Raises:
        DataError: All rows are of one fact.
    """
    facts = facts_of(records)
    alone = [place for place, told in enumerate(facts.told) if not told]
    if len(alone) < 2:
        raise DataError(
            f"the {len(records)} forget rows are all of one fact and cannot be split in two.",
            where="attack 'relearn'",
            hint="Give rows of two facts or more, or relearn from other rows (rows: unrelated).",
        )
    order = torch.randperm(len(alone), generator=generator(seed, "relearn.split")).tolist()
    count = sum(len(facts.groups[place]) for place in alone)
    side = dict.fromkeys(alone, HELD_OUT)
    size = 0
    for position in order[:-1]:  # the last one is always held out
        more = len(facts.groups[alone[position]])
        # Stops where the count is closest to the share, but takes one fact at least.
        if size and size + more / 2 > share * count:
            break
        side[alone[position]] = TRAINED
        size += more
    waiting = [place for place, told in enumerate(facts.told) if told]
    while ready := [place for place in waiting if facts.told[place] <= side.keys()]:
        for place in ready:
            sides = {side[told] for told in facts.told[place]}
            side[place] = sides.pop() if len(sides) == 1 else NEITHER
        waiting = [place for place in waiting if place not in side]
    where = {row: side.get(place) for place, rows in enumerate(facts.groups) for row in rows}
    trained, held_out = (
        [record for index, record in enumerate(records) if where[index] == wanted]
        for wanted in (TRAINED, HELD_OUT)
    )
    return trained, held_out


@register(
    kind="attack",
    name="relearn",
    title="Relearning",
    summary="Fine-tunes a copy for a few steps and asks about facts that it was not trained on.",
    paper="2410.08827",
    year=2024,
    family="relearning",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="quick",
    badges=("variant",),
    variant="One split by facts without rotation, AdamW, and the loss on answer tokens only.",
)
class Relearn(ModelAttack):
    """Options of relearning."""

    rows: RowsFrom = Field("forget", description="Which rows the copy is trained on.")
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
        """Both adapters on forget rows, and half as many steps on unrelated rows."""
        return (
            {"rows": "forget", "adapter": "full"},
            {"rows": "forget", "adapter": "lora"},
            {"rows": "unrelated", "adapter": "full", "steps": max(1, self.steps // 2)},
        )

    def variant_title(self) -> str:
        """Such as "LoRA, unrelated rows, 20 steps"."""
        kind = "LoRA" if self.adapter == "lora" else "full"
        return f"{kind}, {self.rows} rows, {self.steps} step{'s' * (self.steps > 1)}"

    def trained_on(self, context: AttackContext) -> Sequence[RecordBase]:
        """The rows of the fine-tuning.

        Raises:
            DataError: There are none, or the forget rows cannot be split.
        """
        rows: Sequence[RecordBase] = getattr(context, self.rows)
        if not rows:
            raise DataError(
                f"there are no {self.rows} rows to relearn from.",
                where="attack 'relearn'",
                hint=f"Add {FLAGS[self.rows]} FILE, or choose other rows (rows: …).",
            )
        if self.rows == "forget":
            return split_by_fact(rows, self.share, context.seed)[0]
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

    def recipe(self, lm: LM, rows: int) -> Recipe:
        """The fine-tuning as a recipe of the training engine."""
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate or LEARNING_RATES[self.adapter],
            "epochs": math.ceil(self.steps / math.ceil(rows / self.batch_size)),
            "max_steps": self.steps,
            "batch_size": self.batch_size,
            "warmup_steps": self.steps // 10,
            "schedule": "constant",
            # As the model is measured: the curve and the end must be comparable with the start.
            "precision": lm.precision,
            "max_length": lm.template.max_length,
        }
        slots: dict[str, Any] = {}
        if self.adapter == "lora":
            slots["place"] = {"name": "lora", "rank": self.rank, "alpha": self.alpha}
            slots["finish"] = "merge_adapter"
        training = {f"training.{name}": value for name, value in options.items()}
        return Recipe.named("finetune").changed(slots, training)

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The fine-tuned copy, an ordinary model also after LoRA.

        Raises:
            DataError: There are no rows, or they cannot be split.
            RunError: Training collapsed or moved nothing.
        """
        rows = self.trained_on(context)
        twin = lm.copy()
        twin.merge_adapter()  # or an adapter would escape the attack

        def progress(step: int, total: int, numbers: Mapping[str, float]) -> None:
            if context.observe and (step % self.observe_steps == 0 or step == total):
                twin.touch()
                context.observe(twin, step)
            if context.progress is not None:
                context.progress(step, total)

        if context.observe:
            context.observe(twin, 0)
        trainer = Trainer(
            twin,
            self.recipe(twin, len(rows)),
            {"forget": rows},  # what the engine calls forget rows are those its objective reads
            context=Context(seed=context.seed, steps=progress),
        )
        result = trainer.train()
        context.notes["relearning_rows"] = len(rows)
        if self.rows == "forget" and (out := self.left_out(context)):
            context.notes["note"] = (
                f"{out} forget row{'s' * (out > 1)} tell{'s' * (out == 1)} facts of both sides, "
                "trained and held out, and took no part."
            )
        context.notes["relearning_tokens"] = result.tokens
        context.notes["relearning_loss"] = [
            result.history[0]["forget_loss"], result.history[-1]["forget_loss"]
        ]  # fmt: skip
        return result.lm
