"""Rejection sampling: fine-tuning on the best of n answers of the model itself.

    for each drawn question: n answers, the one with the highest reward y*;
    loss = cross-entropy on y*, averaged over its tokens

A baseline for methods that learn by rewards: it draws as many tokens as they do and learns only
from the best. Where all answers to a question earn the same, none of them is learned.

Paper: arXiv 2308.01825. Deviation: one round, all answers drawn from the start model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from delible.made import Made
from delible.method import Outcome
from delible.records import QA
from delible.registry import register
from delible.stages.procedure import recipe_of
from delible.stages.rewarded import forget_pairs
from delible.stages.sampled import SampledProcedure
from delible.stages.work import Work


@register(
    kind="procedure",
    name="rejection_finetuning",
    title="Fine-tuning on the best of n",
    summary="Fine-tunes on the answers of the model itself that earn most.",
    paper="2308.01825",
    year=2023,
    family="on-policy",
    intention="suppression",
    mechanism="RL",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="what no sampled answer does is not learned",
    advice="a baseline: it learns only from what the model says by itself, and small models "
    "decline nothing by themselves; more --steps and a higher --learning-rate go further",
)
class RejectionFinetuning(SampledProcedure):
    """Options of rejection sampling."""

    stages: ClassVar = {"sample": "answers and what they earn", "train": "training on the best"}

    learning_rate: float = Field(1e-5, gt=0, le=1, description="Of the training.")
    epochs: int = Field(3, ge=1, description="Passes over the best answers.")

    def run(self, work: Work) -> Outcome:
        forget_pairs(work)
        made: Made = self.sampled(work)
        rows = [QA(question=one["question"], answer=one["best"], subject=one["subject"])
                for one in made["pairs"]]  # fmt: skip
        options: dict[str, Any] = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        recipe = recipe_of("finetune", slots={"place": self.place}, options=options)
        return self.learned(work, "train", recipe, made, {"forget": rows})
