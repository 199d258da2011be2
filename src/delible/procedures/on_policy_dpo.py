"""DPO from the model's own answers: the best of a group is preferred to the worst.

    margin = [log p(b | x) - log p_ref(b | x)] - [log p(w | x) - log p_ref(w | x)]
    loss   = (2 / beta) softplus(-beta margin)

with b and w the answers to x that earned most and least; the reference is the start model. A
baseline for methods that learn by rewards, at as many generated tokens. Groups in which all answers
earn the same make no pair.

Paper: arXiv 2305.18290, with pairs as in 2402.04792. Deviation: one round, all answers drawn from
the start model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from delible.method import Outcome
from delible.records import QA
from delible.registry import register
from delible.stages.procedure import recipe_of
from delible.stages.rewarded import forget_pairs
from delible.stages.sampled import SampledProcedure
from delible.stages.work import Work


@register(
    kind="procedure",
    name="on_policy_dpo",
    title="DPO from own answers",
    summary="Prefers those of the model's own answers that earn most to those that earn least.",
    paper="2305.18290",
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
class OnPolicyDPO(SampledProcedure):
    """Options of DPO from own answers."""

    stages: ClassVar = {"sample": "answers and what they earn", "train": "training on the pairs"}

    learning_rate: float = Field(1e-5, gt=0, le=1, description="Of the training.")
    epochs: int = Field(3, ge=1, description="Passes over the pairs.")
    beta: float = Field(0.1, gt=0, description="Inverse temperature; strength of the reference.")

    def run(self, work: Work) -> Outcome:
        forget_pairs(work)
        made = self.sampled(work)
        rows: dict[str, list[Any]] = {
            role: [QA(question=one["question"], answer=one[which], subject=one["subject"])
                   for one in made["pairs"]]
            for role, which in (("forget", "worst"), ("alternate", "best"))
        }  # fmt: skip
        slots = {"objective": {"name": "altpo", "beta": self.beta}, "place": self.place}
        options: dict[str, Any] = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        recipe = recipe_of("finetune", slots=slots, options=options)
        return self.learned(work, "train", recipe, made, rows)
