"""ULD: an assistant remembers what is to be forgotten, and its logits are taken away.

    assistant  = the model's first K blocks, its norm and its head, all frozen, with adapters
    training   : CE(answers of forget rows) + beta * KL(uniform || p)(answers of retain rows)
    inference  : l = b - alpha * (a - mean a) at likely tokens, b elsewhere

Forget rows are the records and paraphrases of them, retain rows are retain records and wrong
answers to the forget questions (``generate: augmented``). Both terms have a floor, so neither
runs away; the model is never changed. Whoever takes the assistant away has the model as it was,
and whoever asks it has what was to be forgotten: this suppresses.

A further request on the result puts a further assistant beside the earlier ones; at each token
the most certain of them is taken away. Each is taken off by itself, exactly, and each adds its
blocks to the time of an answer.

Paper: arXiv 2406.08607. Reference code: UCSB-NLP-Chang/ULD. Deviations: the assistant's logits are
centred before they are subtracted (in the released code, where filtered tokens get 0 and the others
``-alpha a``, a common offset of the assistant moves probability; ``centred=false`` is that); the
uniform term counts answer tokens only; the assistant of the last step is taken, not that of the
epoch with the best forget quality on the test split.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from pydantic import Field

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.lm.shortened import shortened
from delible.method import Outcome
from delible.ranges import DECADE, Range
from delible.registry import register
from delible.stages.procedure import Procedure, recipe_of
from delible.stages.work import Work
from delible.systems.arithmetic import Assistant, Subtraction, below, cost_share, together
from delible.train.recipe import Recipe

logger = logging.getLogger(__name__)


@register(
    kind="procedure",
    name="uld",
    title="ULD (logit difference)",
    summary="Trains a small assistant to remember the forget rows and takes its logits away.",
    paper="2406.08607",
    year=2024,
    family="logit arithmetic",
    intention="suppression",
    mechanism="wrapper",
    needs=("forget", "retain", "weights"),
    changes="logits",
    reversible=True,
    retrain_goal=False,
    weakest="taking the assistant away",
    advice="raise assistant_weight (up to about 1) to forget more, or epochs where the assistant "
    "has not learned the rows; a lower assistant_weight or filter_share changes less",
    badges=("variant",),
    variant="The assistant is centred; the uniform term counts answer tokens only.",
)
class ULD(Procedure):
    """Options of ULD."""

    stages: ClassVar = {"assistant": "the assistant learns what is to be forgotten"}
    keeps_adapter: ClassVar[bool] = True

    layers: int = Field(
        8, ge=1, description="Blocks of the assistant; of a model with fewer than twice as many: "
        "half of them.",
    )  # fmt: skip
    assistant_weight: float = Field(
        0.75, ge=0, le=10, description="Of what is subtracted; 0 takes nothing."
    )
    filter_share: float | None = Field(
        0.01, gt=0, le=1, description="Only tokens of at least this share of the likeliest one's "
        "probability are changed, and at least this share of the vocabulary; none: all tokens.",
    )  # fmt: skip
    centred: bool = Field(
        True, description="Take the assistant's mean logit off first; false: as released."
    )
    paraphrases: int = Field(2, ge=0, le=16, description="Paraphrased rows per forget record.")
    perturbed: int = Field(2, ge=0, le=16, description="Wrong answers per forget record.")
    retain_weight: float = Field(6.5, ge=0, description="Weight of the uniform term (beta).")
    rank: int = Field(32, ge=1, description="Of the assistant's adapters.")
    adapter_scale: float = Field(32.0, gt=0, description="Their alpha: scaled by alpha / rank.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate.")
    epochs: int = Field(10, ge=1, description="Passes over the forget rows.")
    least_steps: int | None = Field(
        60, ge=1, description="More passes where there are few rows: at least so many steps."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimiser steps.")
    batch_size: int = Field(32, ge=1, description="Forget rows per optimiser step.")
    recipe: str | None = Field(
        None, description="Name or file of another recipe that trains the assistant; none: the "
        "one that these options describe.",
    )  # fmt: skip

    @property
    def subtraction(self) -> Subtraction:
        """How the assistant is taken away."""
        return Subtraction(
            strength=self.assistant_weight, filter_share=self.filter_share, centred=self.centred
        )

    def training(self) -> Recipe:
        """How the assistant is trained.

        Raises:
            RecipeError: The named recipe is unknown, or would change the model.
        """
        if self.recipe is not None:
            recipe = recipe_of(self.recipe)
            if recipe.place.card.changes != "adapter" or recipe.finish.card.name != "none":
                raise RecipeError(
                    "the assistant's blocks are the model's own and must not move: its recipe "
                    "trains an adapter, and merges nothing.",
                    where=f"recipe '{recipe.name}' of procedure '{self.name}'",
                    hint="Give it place: lora and finish: none.",
                )
            return recipe
        content: dict[str, Any] = {
            "name": self.name,
            "generate": {
                "name": "augmented", "paraphrases": self.paraphrases, "perturbed": self.perturbed,
            },
            "place": {"name": "lora", "rank": self.rank, "alpha": self.adapter_scale},
            "objective": "finetune",
            "keep": "uniform",
            "balance": {"name": "weighted_sum", "retain_weight": self.retain_weight},
            "training": {
                "learning_rate": self.learning_rate, "epochs": self.epochs,
                "least_steps": self.least_steps, "max_steps": self.max_steps,
                "batch_size": self.batch_size,
                "warmup_share": 0.1, "weight_decay": 0.01,
            },
        }  # fmt: skip
        return Recipe.from_mapping(content, where=f"procedure '{self.name}'")

    def ranges(self) -> dict[str, Range]:
        """The rate, the weight of the uniform term, and how much is taken away."""
        rate = self.learning_rate
        return {
            "learning_rate": Range(low=rate / DECADE, high=min(1.0, rate * DECADE), log=True),
            "retain_weight": Range(low=1.0, high=20.0, log=True),
            "assistant_weight": Range(low=0.25, high=1.5),
        }

    def blocks(self, lm: LM) -> int:
        """Blocks of the assistant of a model."""
        return min(self.layers, max(1, below(lm).anatomy.layers // 2))

    def run(self, work: Work) -> Outcome:
        lm, layers = work.lm, self.blocks(work.lm)
        if layers < self.layers:
            logger.info(
                f"uld: the model has {lm.anatomy.layers} blocks, so the assistant has {layers}, "
                f"not {self.layers}."
            )
        start = shortened(below(lm), layers, f"assistant of {lm.name}")
        flags = [one.requires_grad for one in lm.core.parameters()]
        trained = work.train("assistant", self.training(), lm=start)
        for one, flag in zip(lm.core.parameters(), flags, strict=True):
            one.requires_grad_(flag)  # the assistant's blocks are the model's own, and were frozen
        assistant = Assistant(trained.lm, self.subtraction)
        notes = {**trained.notes, "layers": layers, "adds": round(cost_share(lm, layers), 4)}
        if trained.stopped:
            notes["stopped"] = trained.stopped
        return Outcome(
            together(lm, [assistant]), "arithmetic", assistant, notes, stopped=trained.stopped
        )
