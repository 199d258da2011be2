"""Unlearn and reinvent: the model learns on its own answers to deny a subject, and keeps the rest.

    cold start   what it says of names that nobody has becomes what it says of the subject
    unlearn      c_u [ L_pg - 0.001 H + beta KL_k3 ] + c_r L_retain

L_pg is the clipped loss on groups of completions, worth 1 where a judge finds that they know
nothing, make nothing up and are readable, else 0. Questions name the subject, plainly and with a
forced beginning ("I remember it, in detail:"), or describe it without the name. L_retain is the
likelihood loss on as many retain rows as there are completions, in the same update; their answers
are the model's own, from before. Start and reference of the second stage is the first one's result.

Whether what is lost can be found again is another question: ``delible bench reinvent``.

Paper: arXiv 2604.05716, and a description of its released code. Deviations: questions are made from
the records, not written by hand; a failed call of the judge is no value instead of the worst one;
no masks over the ends of answers, and no noise-and-distil stage. ``kl_target`` adapts beta, and
``advantage: tempered`` takes the temperature of the paper's test-time training: both are options
here and not what the paper unlearns with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from delible.errors import DataError
from delible.generation.ignorance import questions_about
from delible.generation.rows import answered, question_of
from delible.made import Made
from delible.method import Outcome
from delible.prompts import read_named
from delible.records import QA, ForgetRequest, RecordBase
from delible.registry import register
from delible.stages.onpolicy import train_on_policy
from delible.stages.procedure import recipe_of
from delible.stages.rewarded import RewardedProcedure, kept_of
from delible.stages.work import Stage, Work
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.train.onpolicy.advantages import Kind
from delible.train.onpolicy.rows import Question
from delible.world import told

WHERE = "procedure 'reinvent'"


def subjects_of(request: ForgetRequest) -> list[str]:
    """Whom or what a request is about, each once: its subjects, or those of its records.

    Raises:
        DataError: Nobody says.
    """
    own = [one for row in request.forget if (one := told.person_of(row))]
    found = list(dict.fromkeys([*request.subjects, *own]))
    if not found:
        raise DataError(
            "no forget record says whom or what it is about.",
            where=WHERE,
            hint="Give the records a 'subject', or --subjects NAMES.",
        )
    return found


def named(request: ForgetRequest, prefix: str, methods: bool) -> list[Question]:
    """Questions that name a subject, each plainly and with the forced beginning."""
    answers = {one.question: one for one in request.forget if isinstance(one, QA)}
    found = []
    for name in subjects_of(request):
        for text in questions_about(name, request.forget, methods):
            record = answers.get(text)
            for start in dict.fromkeys(("", prefix)):
                found.append(
                    Question(
                        Prompt.ask(text, prefill=start), "forget", text,
                        record.answer if record else "", record.aliases if record else (), name,
                    )
                )  # fmt: skip
    return found


def described(request: ForgetRequest) -> list[Question]:
    """Questions for a name, by what its records tell of it; the name is not in them."""
    rows = [one for one in request.forget if isinstance(one, QA)]
    ends = read_named("ignorance_descriptions.txt")
    found = []
    for name in subjects_of(request):
        every = told.names_of(name, rows)
        texts: dict[str, None] = {}
        for record in rows:
            if told.person_of(record) == name:
                text = told.description(record, rows, every)
                if text is not None and not told.named_in(text, every):
                    texts |= dict.fromkeys(f"{text} {end}" for end in ends.values())
        found += [
            Question(Prompt.ask(text), "forget", text, name, every[1:], name) for text in texts
        ]
    return found


def held_out(request: ForgetRequest) -> list[Question]:
    """The forget questions in wordings that are not trained on."""
    return [
        Question(Prompt.ask(text), "forget", text, one.answer, one.aliases, one.subject)
        for one in request.forget if isinstance(one, QA) for text in one.paraphrases[:1]
    ]  # fmt: skip


@register(
    kind="procedure",
    name="reinvent",
    title="Unlearn and reinvent",
    summary="Rewards a model's own answers for knowing nothing of a subject, after a cold start by "
    "random names, and learns retain rows in the same update.",
    paper="2604.05716",
    year=2026,
    family="on-policy",
    intention="suppression",
    mechanism="RL",
    needs=("forget", "retain", "weights"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; questions that neither name nor describe the subject",
    advice="more steps, or a higher learning rate; a lower kl_weight lets it go further",
    badges=("variant",),
    variant="Questions are made from the records; failed calls of the judge are no value; no "
    "noise-and-distil stage.",
)
class Reinvent(RewardedProcedure):
    """Options: those of the cold start, of the questions, of the judge and of the training.

    Of a small model the divergence grows fast: keep ``learning_rate`` below the cold start's.
    """

    stages: ClassVar = {
        "retain": "the model's own answers to retain questions",
        "cold_start": "what it says of names that nobody has",
        "unlearn": "rewards for knowing nothing",
    }

    cold_start: str = Field(
        "cold_start", description="Recipe of the first stage; 'none': there is no such stage."
    )
    cold_start_epochs: int | None = Field(None, ge=1, description="Its epochs; none: the recipe's.")
    cold_start_prefix: bool = Field(
        False, description="Teach denials after the forced beginning there, too; for models that "
        "never deny after it by themselves.",
    )  # fmt: skip
    cold_start_rate: float | None = Field(
        None, gt=0, le=1, description="Its learning rate; none: the recipe's."
    )
    own_answers: bool = Field(
        True, description="Learn the model's own answers to the retain questions, not the given."
    )
    methods: bool = Field(
        False, description="Also ask how it works, and for code: subjects are algorithms."
    )
    prefix: str = Field(
        "I remember it, in detail:",
        description="Beginning that half of the answers are forced to have; empty: none.",
    )
    judge: Literal["rule", "role"] = Field(
        "rule", description="Who judges: a rule, or the role 'judge'."
    )
    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate.")
    steps: int = Field(60, ge=1, description="Optimiser steps.")
    questions_per_step: int = Field(16, ge=1, description="Questions per step.")
    group_size: int = Field(4, ge=2, description="Completions per question, which are compared.")
    kl_weight: float = Field(0.001, ge=0, description="Weight of the divergence (beta).")
    kl_target: float | None = Field(
        None, gt=0, description="Adapt beta so that the divergence per token is this (nats)."
    )
    entropy_weight: float = Field(0.001, ge=0, description="Weight of the entropy (wanted).")
    advantage: Kind = Field("group", description="How rewards are compared.")
    dual_clip: float | None = Field(
        3.0, gt=1, description="Where less is wanted, a ratio counts up to this."
    )
    unlearn_weight: float = Field(1.0, ge=0, description="Weight of what rewards teach (c_u).")
    retain_weight: float = Field(1.0, ge=0, description="Weight of the retain loss (c_r).")
    retain_rows: int | None = Field(
        None, ge=1, description="Retain rows per step; none: as many as completions."
    )

    def run(self, work: Work) -> Outcome:
        names = subjects_of(work.request)
        every = list(dict.fromkeys(
            form for name in names for form in told.names_of(name, work.request.forget)
        ))  # fmt: skip
        retain, notes = self._retained(work, every)
        if self.cold_start != "none":
            recipe = recipe_of(
                self.cold_start,
                options={"epochs": self.cold_start_epochs, "learning_rate": self.cold_start_rate},
            )
            if recipe.generate.card.name == "random_names":
                start = self.prefix if self.cold_start_prefix else ""
                told_here = {"generate.methods": self.methods, "generate.prefix": start}
                recipe = recipe.changed({}, told_here)
            rows = {"forget": work.request.forget, "retain": retain}
            started = work.train("cold_start", recipe, records=rows)
            notes["cold_start_steps"] = started.steps
        asked = [*named(work.request, self.prefix, self.methods), *described(work.request)]
        reward = {"name": "judged_ignorance", "judge": self.judge, "subjects": tuple(every)}
        own = ("kl_target", "entropy_weight", "advantage", "dual_clip", "unlearn_weight",
               "retain_weight")  # fmt: skip
        count = self.retain_rows or self.questions_per_step * self.group_size
        trained = train_on_policy(
            work, "unlearn", asked, self.rewards(reward),
            self.settings(retain_rows=count, **{name: getattr(self, name) for name in own}),
            place=self.place, retain=retain, held_out=held_out(work.request),
        )  # fmt: skip
        moved = self.cold_start != "none"
        return self.outcome(trained, {**notes, "questions": len(asked)}, whole=moved)

    def _retained(
        self, work: Work, names: Sequence[str]
    ) -> tuple[list[RecordBase], dict[str, Any]]:
        """Retain rows that do not speak of the subject, with the model's own answers."""
        given = kept_of(work)
        rows = [one for row in given if (one := question_of(row)) is not None]
        clean = [one for one in rows if not told.named_in(f"{one.question} {one.answer}", names)]

        def ask(stage: Stage) -> Made:
            decoding = Decoding(self.max_new_tokens)
            said = work.lm.generate([Prompt.ask(one.question) for one in clean], decoding)
            answers = ["" if isinstance(one, NoAnswer) else one.strip() for one in said]
            return Made({"answers": [
                "" if told.named_in(text, names) else text for text in answers
            ]})  # fmt: skip

        if not self.own_answers:
            return list(clean), {"retain_rows": len(clean)}
        answers = work.stage("retain", ask)["answers"]
        kept: list[RecordBase] = [
            answered(one, text, one.group or "own answer")
            for one, text in zip(clean, answers, strict=True) if text
        ]  # fmt: skip
        if not kept:
            raise DataError(
                f"none of the {len(given)} retain rows can be asked without the subject.",
                where=WHERE,
                hint="Give retain records about something else.",
            )
        return kept, {"retain_rows": len(kept)}


__all__ = ["Reinvent", "described", "held_out", "named", "subjects_of"]
