"""Looks at a model while it trains, and says when to stop and which weights to keep.

Three reasons to stop early, in any combination: forget answers are improbable enough, in
themselves or against the start; the forget records are known only to a chosen *level* (accuracy on
multiple-choice questions about them); the retain records would lose more than a budget allows. For
a level and for a budget the weights of the best look are kept and put back, so the result is a
model that was really looked at.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.records import QA, Choice, RecordBase
from delible.rundir import RunDirectory
from delible.train import checkpoint
from delible.train.recipe import Training
from delible.world import templates

logger = logging.getLogger(__name__)

#: Rows of a role that a look takes in, at most.
MONITORED_ROWS = 32
#: Options of a question that is made of a record with wrong answers; chance is 1 / OPTIONS.
OPTIONS = 4
#: How far from the chosen level of accuracy a model may end.
LEVEL_MARGIN = 0.03


def level_questions(records: Sequence[RecordBase], seed: int) -> list[Choice]:
    """Multiple-choice questions about records; passages and dialogues have none.

    Questions are asked in another wording where the record has one, so that the level is one of
    knowledge and not of one sentence. Records without wrong answers get some from templates.
    """
    found: list[Choice] = []
    counts: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Choice):
            found.append(record)
        elif isinstance(record, QA):
            random = Random(f"{seed}/level/{record.digest}")
            wrong = templates.false_answers(record, records, OPTIONS - 1, random, counts)
            if wrong:
                question = (*record.paraphrases, record.question)[0]
                options = (record.answer, *wrong)
                found.append(
                    Choice(question=question, options=options, correct=0, images=record.images)
                )
    return found


def knowledge_level(lm: LM, questions: Sequence[Choice]) -> float:
    """Share of questions whose right option is the likeliest, in [0, 1]; NaN if none can be scored.

    Options are scored as answers (cloze), so that a lost habit of saying letters is no ignorance.
    """
    return _mean(lm, questions, {"name": "choice_accuracy", "form": "cloze"})


def answer_probability(lm: LM, records: Sequence[RecordBase]) -> float:
    """Mean answer probability of records, in [0, 1]; NaN if none can be scored."""
    return _mean(lm, records, {"name": "answer_probability"})


def _mean(lm: LM, records: Sequence[RecordBase], metric: dict[str, str]) -> float:
    found = evaluate(lm, {"asked": records}, [build("metric", metric)])
    value = found.means[metric["name"]]["asked"]
    return math.nan if value is None else value


class Monitor:
    """The early stops of one run.

    Args:
        lm: The model in training.
        records: By role.
        parameters: What moves.
        run: Where looks are told and kept weights lie; None keeps them in memory.
        seed: Of the wrong answers that records lack.

    Attributes:
        start_retain: Retain probability before the first step, if there is a budget.
        start_forget: Forget probability before the first step, if a share of it is the goal.
        nearest: Distance of the kept look from the level; infinite before the first.

    Raises:
        RecipeError: A level is asked for and no forget record is a question, or a budget and there
            are no retain records.
    """

    def __init__(
        self,
        lm: LM,
        training: Training,
        records: Mapping[str, Sequence[RecordBase]],
        parameters: Mapping[str, torch.nn.Parameter],
        run: RunDirectory | None,
        seed: int,
    ) -> None:
        self.lm, self.training, self.parameters = lm, training, dict(parameters)
        self.records = {role: list(part)[:MONITORED_ROWS] for role, part in records.items()}
        self.run = run
        self.folder: Path | None = run.path / "checkpoint" / "good" if run else None
        self.kept: dict[str, Tensor] = {}
        self.start_retain: float | None = None
        self.start_forget: float | None = None
        self.nearest = math.inf
        self.asked: list[Choice] = []
        if training.utility_budget is not None and not self.records.get("retain"):
            raise RecipeError(
                "a utility budget is measured on retain records, and there are none.",
                where="utility_budget",
                hint="Add --retain FILE, or leave it out.",
            )
        if training.stop_at_accuracy is not None:
            self.asked = level_questions(self.records["forget"], seed)
            if not self.asked:
                raise RecipeError(
                    "no forget record is a question, so the level of knowledge cannot be told.",
                    where="stop_at_accuracy",
                    hint="Give question-answer or multiple-choice records, or leave it out.",
                )

    @property
    def restores(self) -> bool:
        """Whether the weights of a look are put back at the end."""
        return self.training.utility_budget is not None or bool(self.asked)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """At the first step, or with the ``state`` of the checkpoint that a run goes on from."""
        if state is not None:
            self.start_retain, self.start_forget = state["start_retain"], state["start_forget"]
            nearest = state["nearest"]
            self.nearest = math.inf if nearest is None else nearest
            return
        if self.training.utility_budget is not None:
            self.start_retain = answer_probability(self.lm, self.records["retain"])
            self._keep()  # should the first look already be outside the budget
        if self.training.stop_at_forget_share is not None:
            self.start_forget = answer_probability(self.lm, self.records["forget"])
        if self.asked:
            level = knowledge_level(self.lm, self.asked)
            logger.info(
                f"Accuracy on {len(self.asked)} questions before the first step: {level:.3f}"
            )
            self._keep_if_nearer(level)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        nearest = self.nearest if math.isfinite(self.nearest) else None
        return {
            "start_retain": self.start_retain,
            "start_forget": self.start_forget,
            "nearest": nearest,
        }

    @property
    def target(self) -> float | None:
        """The forget probability at which to stop; None if none was asked for."""
        wanted = [self.training.stop_at_forget_probability]
        if self.training.stop_at_forget_share is not None and self.start_forget is not None:
            wanted.append(self.training.stop_at_forget_share * self.start_forget)
        return max((one for one in wanted if one is not None), default=None)

    def after(self, step: int, *, last: bool = False) -> str | None:
        """After step ``step`` (from 1): why to stop here, or None to go on."""
        training = self.training
        target, budget = self.target, training.utility_budget
        if target is None and not self.restores:
            return None
        if step % training.monitor_steps and not last:
            return None
        self.lm.touch()
        forget = answer_probability(self.lm, self.records["forget"])
        retain = level = None
        if budget is not None:
            retain = answer_probability(self.lm, self.records["retain"])
        if self.asked:
            level = knowledge_level(self.lm, self.asked)
        if self.run is not None:
            self.run.event("monitor", step=step, forget=forget, retain=retain, accuracy=level)
        if budget is not None and retain is not None and self.start_retain is not None:
            if retain < budget * self.start_retain:
                return f"the utility budget was used up at step {step}"
            if level is None:
                self._keep()
        if level is not None and training.stop_at_accuracy is not None:
            self._keep_if_nearer(level)
            if level <= training.stop_at_accuracy + LEVEL_MARGIN:
                return f"the level of knowledge was reached at step {step}: accuracy {level:.3f}"
        if target is not None and forget <= target:
            return f"the forget target was reached at step {step} ({forget:.3f})"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the kept weights back."""
        self.lm.settle()
        if self.folder is not None:
            checkpoint.restore(self.folder, self.parameters, None)
        for name, value in self.kept.items():
            self.parameters[name].copy_(value)

    def _keep_if_nearer(self, level: float) -> None:
        distance = abs(level - (self.training.stop_at_accuracy or 0.0))
        if distance < self.nearest or not math.isfinite(self.nearest):
            self.nearest = distance
            self._keep()

    def _keep(self) -> None:
        if self.folder is None:
            self.kept = {name: value.detach().clone() for name, value in self.parameters.items()}
        elif self.run is not None and (self.run.writes or self.lm.sharded is not None):
            self.lm.settle()
            checkpoint.save(self.folder, self.parameters, None, {})
