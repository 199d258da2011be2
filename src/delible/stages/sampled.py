"""What methods share that sample once and then train by a recipe: answers, and pairs of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from delible.component import build
from delible.errors import DataError, RunError
from delible.generation.boundary import boundary_questions
from delible.made import Made
from delible.method import Outcome
from delible.records import ForgetRequest, RecordBase
from delible.stages.rewarded import (
    RewardedProcedure,
    forget_pairs,
    kept_of,
    subjects_of,
)
from delible.stages.work import Stage, Work
from delible.system.base import System
from delible.train.onpolicy.rewards import Reward, Rewards, asked_by
from delible.train.onpolicy.rows import Question, questions_of
from delible.train.onpolicy.samples import Group, sampled_groups
from delible.train.onpolicy.starting import planned
from delible.train.recipe import Recipe

logger = logging.getLogger(__name__)


class SampledProcedure(RewardedProcedure):
    """Options of sampling; ``steps`` and ``questions_per_step`` say how much is drawn."""

    reward: str | dict[str, Any] = Field(
        "refusal_boundary", description="What answers earn: a reward by name, such as that of RULE "
        "(refusal_boundary) or PURGE (forbidden_entities), or with options.",
    )  # fmt: skip

    uses_trl: ClassVar[bool] = False

    def check(self, system: System, request: ForgetRequest) -> None:
        super().check(system, request)
        build("reward", self.main)

    @property
    def main(self) -> dict[str, Any]:
        """The reward with its options."""
        return {"name": self.reward} if isinstance(self.reward, str) else dict(self.reward)

    def sampled(self, work: Work) -> Made:
        """Stage ``sample``: question, best and worst answer of every group that has both.

        Raises:
            DataError: No boundary questions, where the reward wants them.
            RunError: All answers to every question earn the same.
        """
        questions = self._questions(work)
        settings = self.settings()

        def make(stage: Stage) -> Made:
            rewards = Rewards(self.rewards(self.main), questions, stage.context)
            plan = planned(len(questions), settings, stage.context.seed)
            groups = sampled_groups(
                work.lm, questions, self._within(plan), rewards, settings, stage.context.seed,
                stage.context.stage,
            )  # fmt: skip
            tokens = sum(len(said.tokens) for group in groups for said in group.completions)
            stage.tokens += tokens
            pairs = paired(groups)
            if not pairs:
                raise self._nothing_to_learn(groups, rewards)
            told = {"groups": len(groups), "generated_tokens": tokens,
                    "no_value": dict(rewards.tally.no_value)}  # fmt: skip
            return Made({"pairs": pairs, "told": told})

        main: Reward = build("reward", self.main)
        return work.stage("sample", make, inputs=asked_by([main], work.context))

    def _nothing_to_learn(self, groups: Sequence[Group], rewards: Rewards) -> RunError:
        where, failed = f"procedure '{self.name}'", rewards.tally.no_value
        if failed and all(total.value is None for group in groups for total in group.totals):
            return RunError(
                f"no answer had a value ({failed.most_common(1)[0][0]}).", where=where,
                hint="Look at the role that judges.",
            )  # fmt: skip
        lacking = f" ({sum(failed.values())} had no value)" if failed else ""
        return RunError(
            f"all answers to each of {len(groups)} questions earned the same{lacking}.",
            where=where,
            hint="Raise group_size or temperature, or choose a graded reward.",
        )

    def _within(self, plan: Sequence[int]) -> Sequence[int]:
        """The plan as far as the token budget surely goes."""
        if self.token_budget is None:
            return plan
        most = self.token_budget // (self.group_size * self.max_new_tokens)
        return plan[: max(1, most)]

    def _questions(self, work: Work) -> list[Question]:
        pairs = forget_pairs(work)
        questions = questions_of(pairs, "forget")
        subjects, kept = subjects_of(work, pairs), kept_of(work)
        try:
            found, _ = boundary_questions(pairs, kept, subjects,
                                          writer=work.context.plays("writer"),
                                          seed=work.context.seed,
                                          where=f"procedure '{self.name}'")  # fmt: skip
        except DataError:
            if self.main["name"] == "refusal_boundary":
                raise
            return questions
        return [*questions, *questions_of(found, "boundary")]

    def learned(
        self,
        work: Work,
        name: str,
        recipe: Recipe,
        made: Made,
        rows: Mapping[str, Sequence[RecordBase]],
    ) -> Outcome:
        """The last stage, by a recipe on what was sampled."""
        given = {"forget": rows["forget"]}
        others = {role: part for role, part in rows.items() if role != "forget"}
        options: dict[str, Any] = {"generated": rows} if others else {}
        trained = work.train(name, recipe, records=given, inputs=made["told"], **options)
        notes = {**made["told"], "learned_from": len(made["pairs"])}
        return self.outcome(trained, notes)


def paired(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Best and worst answer of each group in which they earned differently."""
    pairs = []
    for group in groups:
        ranked = group.ranked()
        if len(ranked) < 2 or group.value_of(ranked[0]) <= group.value_of(ranked[-1]):
            continue
        pairs.append({
            "question": group.question.text, "subject": group.question.subject,
            "tag": group.question.tag, "best": ranked[0].text, "worst": ranked[-1].text,
        })  # fmt: skip
    return pairs


__all__ = ["SampledProcedure", "paired"]
