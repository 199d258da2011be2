"""PURGE: an answer that names nothing of the subject passes.

    reward = 1 if no forbidden entity occurs in the answer, else 0
    loss   = -(1/G) sum_i (1/|y_i|) sum_t min(rho A_i, clip(rho) A_i) + beta KL(k3)

Stage `entities` lists what must not be named (from the records, or by the role ``writer`` from the
model's own answers); stage `optimise` runs GRPO with per-sequence normalisation on the questions.
The divergence from the start model is the only protection of what is kept.

Paper: arXiv 2601.20568 (no official code; defaults of a public re-implementation). Deviations:
matches fold accents, look-alikes and separators; entities that are ordinary words are set apart;
`length` and `well_formed` gates by default, as empty text and gibberish name nothing either.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from delible.generation.forbidden import forbidden
from delible.made import Made
from delible.method import Outcome
from delible.registry import register
from delible.stages.onpolicy import train_on_policy
from delible.stages.rewarded import (
    RewardedProcedure,
    forget_pairs,
    kept_of,
    parted,
    subjects_of,
)
from delible.stages.work import Stage, Work


@register(
    kind="procedure",
    name="purge",
    title="PURGE",
    summary="Learns, by rewards, to answer without naming anything that tells about the subject.",
    paper="2601.20568",
    year=2026,
    family="on-policy",
    intention="suppression",
    mechanism="RL",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="paraphrases and misspellings of what is forbidden",
    advice="nothing is retained by design (default model: 92 % of the way, 62 % kept): "
    "--utility-budget 0.9 stops before more is lost; where little was forgotten, take more --steps "
    "or a higher --learning-rate",
    badges=("variant",),
    variant="Folded matches, soft entities apart, gates against empty and garbled answers.",
)
class Purge(RewardedProcedure):
    """Options of PURGE."""

    stages: ClassVar = {
        "entities": "what must not be named",
        "optimise": "answers rewarded for not naming it",
    }

    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate.")
    steps: int = Field(150, ge=1, description="Optimiser steps.")
    kl_weight: float = Field(0.04, ge=0, description="Weight of the divergence from the start.")
    guards: tuple[str, ...] = Field(
        ("length", "well_formed"), description="Further rewards by name; these two are gates."
    )
    entities: tuple[str, ...] = Field(
        (), description="What must not be named, with aliases behind bars; none: they are found."
    )
    most: int = Field(50, ge=1, description="Entities at most.")
    strict: bool = Field(False, description="Count ordinary words among them, too.")
    form: Literal["binary", "graded", "exponential", "per_word"] = Field(
        "binary", description="How occurrences become a reward, see forbidden_entities."
    )
    refusal_cost: float = Field(0.0, ge=0, le=1, description="Share that a refusal loses.")
    held_out: float = Field(0.2, ge=0, lt=1, description="Share of questions never trained on.")
    stop_at_reward: float | None = Field(
        0.9, description="Stop once the mean reward was this high for 5 steps in a row."
    )

    def run(self, work: Work) -> Outcome:
        pairs = forget_pairs(work)
        subjects = subjects_of(work, pairs)

        def made(stage: Stage) -> Made:
            if self.entities:
                return Made({"hard": list(self.entities), "soft": [], "counts": {"given": 1}})
            hard, soft, counts = forbidden(
                pairs, subjects, writer=stage.context.plays("writer"), system=work.lm,
                most=self.most, tokens=self.max_new_tokens, where="procedure 'purge'",
            )  # fmt: skip
            return Made({"hard": hard, "soft": soft, "counts": counts})

        listed = work.stage("entities", made)
        questions, held_out = parted(pairs, self.held_out, work.context.seed)
        reward: dict[str, Any] = {
            "name": "forbidden_entities", "entities": listed["hard"], "soft": listed["soft"],
            "strict": self.strict, "form": self.form, "refusal_cost": self.refusal_cost,
        }  # fmt: skip
        trained = train_on_policy(
            work, "optimise", questions, self.rewards(reward),
            self.settings(normalisation="sequence", stop_at_reward=self.stop_at_reward),
            place=self.place, retain=kept_of(work), held_out=held_out,
        )  # fmt: skip
        counts = {"entities": len(listed["hard"]), "soft_entities": len(listed["soft"])}
        return self.outcome(trained, {**counts, "held_out_questions": len(held_out)})
