"""RULE: learns where the boundary of refusing lies.

    stage 1 (steer)      cross-entropy on forget question -> refusal that names the subject
    stage 2 (optimise)   GRPO on forget and boundary questions with the rewards
                         0.5 R + 0.5 R [named] and 0.5 (1-R) + 0.5 (1-R) [recall > 0.3]

R = 1 for a refusal. The reference of stage 2 is the steered model. Without stage 1 refusals are
never sampled; without boundary questions everything is refused, so a run without any is refused.

Paper: arXiv 2506.07171 (the official repository's files were read for numbers). Deviations: the
released blank-filling forms of the questions are the records' paraphrases, if they have any; the
divergence is not clamped to [-10, 10]; a refusal must show early in the answer; learning rates are
for the default model (paper: 4e-7 and 2e-6 for 8B).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from delible.component import build
from delible.generation.boundary import boundary_questions
from delible.made import Made
from delible.method import Outcome
from delible.prompts import read_lines
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.stages.onpolicy import train_on_policy
from delible.stages.procedure import recipe_of
from delible.stages.rewarded import (
    RewardedProcedure,
    forget_pairs,
    kept_of,
    reworded,
    subjects_of,
)
from delible.stages.work import Stage, Work
from delible.system.base import System
from delible.train.onpolicy.rows import questions_of

#: What a question without a subject is declined about.
NOBODY = "that"


def refusals(pairs: list[QA], draws: list[int], sentences: tuple[str, ...]) -> list[QA]:
    """Each question with a refusal that names its subject."""
    return [
        QA(
            question=one.question,
            answer=sentences[draw % len(sentences)].replace("{subject}", one.subject or NOBODY),
            subject=one.subject,
        )
        for one, draw in zip(pairs, draws, strict=True)
    ]


@register(
    kind="procedure",
    name="rule",
    title="RULE",
    summary="Learns to refuse the forget questions and to answer their neighbours, by rewards.",
    paper="2506.07171",
    year=2025,
    family="on-policy",
    intention="suppression",
    mechanism="RL",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="a forced beginning of the answer, other languages",
    advice="needs --neighbours or --retain with the same questions about others, or --role "
    "writer=MODEL, which writes them; small models learn to refuse only with a higher "
    "--steer-learning-rate and more --steer-epochs",
    badges=("variant",),
    variant="Refusals must show early; other forms of questions are the records' own.",
)
class Rule(RewardedProcedure):
    """Options of RULE."""

    stages: ClassVar = {
        "boundary": "questions next to the forgotten ones",
        "steer": "a short training on refusals",
        "optimise": "answers rewarded for refusing here and answering there",
    }

    learning_rate: float = Field(1e-5, gt=0, le=1, description="Of the second stage.")
    kl_weight: float = Field(0.01, ge=0, description="Weight of the divergence from the reference.")
    steer_learning_rate: float = Field(1e-5, gt=0, le=1, description="Of the first stage.")
    steer_epochs: int = Field(3, ge=1, description="Passes over the refusals.")
    steer_batch_size: int = Field(8, ge=1, description="Refusals per step.")
    ratio: int = Field(1, ge=1, description="Boundary questions per forget question.")
    variant: str = Field("two_stage_target", description="Table of rewards, see refusal_boundary.")
    halved: bool = Field(False, description="Half of the table's values on forget questions.")

    def check(self, system: System, request: ForgetRequest) -> None:
        super().check(system, request)
        build("reward", self.table)

    @property
    def table(self) -> dict[str, Any]:
        """The reward of the second stage."""
        return {"name": "refusal_boundary", "variant": self.variant, "halved": self.halved}

    def run(self, work: Work) -> Outcome:
        pairs = forget_pairs(work)
        subjects = subjects_of(work, pairs)
        forms = reworded(pairs)

        def made(stage: Stage) -> Made:
            found, counts = boundary_questions(
                pairs, kept_of(work), subjects, writer=stage.context.plays("writer"),
                ratio=self.ratio, seed=stage.context.seed, where="procedure 'rule'",
            )  # fmt: skip
            count, random = len(read_lines("refusals_about.txt")), stage.generator("refusals")
            drawn = torch.randint(count, (len(forms),), generator=random).tolist()
            rows = [one.model_dump(mode="json") for one in found]
            return Made({"boundary": rows, "counts": counts, "drawn": drawn})

        stage = work.stage("boundary", made)
        boundary = [QA.model_validate(one) for one in stage["boundary"]]
        refused = refusals(forms, list(stage["drawn"]), read_lines("refusals_about.txt"))
        options: dict[str, Any] = {
            "learning_rate": self.steer_learning_rate, "epochs": self.steer_epochs,
            "batch_size": self.steer_batch_size, "schedule": "cosine",
        }  # fmt: skip
        recipe = recipe_of("finetune", options=options)
        work.train("steer", recipe, records={"forget": refused})
        questions = [*questions_of(forms, "forget"), *questions_of(boundary, "boundary")]
        trained = train_on_policy(
            work, "optimise", questions, self.rewards(self.table),
            self.settings(clip_high=0.3, dual_clip=3.0, weight_decay=0.01, normalisation="token"),
            place=self.place, retain=kept_of(work),
        )  # fmt: skip
        notes = {"boundary_questions": len(boundary), "boundary_from": dict(stage["counts"])}
        return self.outcome(trained, notes, whole=True)
