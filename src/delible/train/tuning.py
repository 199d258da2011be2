"""Plain fine-tuning of a copy, as attacks do it: all weights or a merged low-rank adapter.

theta' = AdamW(theta, mean of -log p(answer | question)),  a given number of steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delible.context import Context
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.train.engine import Trainer
from delible.train.processes import refuse_shares
from delible.train.recipe import Recipe

#: Called as ``watch(lm, step, steps)`` with the model as it is after a step, and before the first.
Watch = Callable[[LM, int, int], None]


@dataclass(frozen=True)
class FineTuning:
    """How a copy is fine-tuned.

    Attributes:
        learning_rate: Peak rate of AdamW.
        rank: Of a low-rank adapter that is merged at the end; None: all weights are trained.
        alpha: Scale of the adapter times its rank.
    """

    steps: int
    learning_rate: float
    batch_size: int = 4
    rank: int | None = None
    alpha: float = 16.0

    def recipe(self, lm: LM, rows: int) -> Recipe:
        """It as a recipe of the training engine.

        Args:
            rows: How many rows there are.
        """
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate,
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
        if self.rank is not None:
            slots["place"] = {"name": "lora", "rank": self.rank, "alpha": self.alpha}
            slots["finish"] = "merge_adapter"
        training = {f"training.{name}": value for name, value in options.items()}
        return Recipe.named("finetune").changed(slots, training)

    def tuned(
        self, lm: LM, rows: Sequence[RecordBase], seed: int, watch: Watch | None = None
    ) -> Tuned:
        """A fine-tuned copy, an ordinary model also after LoRA; the one given stays as it was.

        Raises:
            RunError: Training collapsed or moved nothing.
        """
        refuse_shares("a fine-tuned copy")
        twin = lm.copy()
        twin.merge_adapter()  # or an adapter would escape the attack

        def progress(step: int, total: int, numbers: Mapping[str, float]) -> None:
            if watch is not None:
                twin.touch()
                watch(twin, step, total)

        if watch is not None:
            watch(twin, 0, self.steps)
        trainer = Trainer(
            twin,
            self.recipe(twin, len(rows)),
            {"forget": rows},  # what the engine calls forget rows are those its objective reads
            context=Context(seed=seed, steps=progress),
        )
        result = trainer.train()
        losses = result.history[0]["forget_loss"], result.history[-1]["forget_loss"]
        return Tuned(result.lm, result.tokens, losses)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned copy.

    Attributes:
        tokens: Trained on.
        losses: Of the first and the last step.
    """

    lm: LM
    tokens: int
    losses: tuple[float, float]
