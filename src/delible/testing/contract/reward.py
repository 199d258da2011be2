"""Rewards: numbers or reasons, of each completion alone, and not always the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from delible.testing.contract.trial import FORGET, RETAIN, Trial, require
from delible.train.onpolicy.rewards import Reward, Score
from delible.train.onpolicy.rows import Completion, Question, Scored, questions_of

#: What may be said to any question, beside its true answer.
SAID = (
    "I'm sorry, I don't know anything about that.",
    "I'm sorry, I don't know anything about Ada Quill.",
    "It was a long time ago, and nobody kept a record of the day.",
    "",
    "%% ## || ~~ %% ##",
    "la la la la la la la la la la la la la la la la",
    "Это было давно, и никто не знает.",
)


def reward_judges_each_completion_alone(trial: Trial) -> None:
    """A finite number or a reason for each, whoever is beside it, and twice the same."""
    score, completions = _ready(trial)
    whole = _judged(score, completions)
    require(len(whole) == len(completions), "not one result per completion")
    for one, found in zip(completions, whole, strict=True):
        known = found.value is not None
        require(known or found.reason, f"neither a value nor a reason for {one.text!r}")
        require(not known or math.isfinite(found.value or 0.0), f"no number for {one.text!r}")
    require(_judged(score, completions) == whole, "judged twice, the same answers earn otherwise")
    backwards = _judged(score, completions[::-1])[::-1]
    require(backwards == whole, "an answer earns otherwise in another order")
    alone = [_judged(score, [one])[0] for one in completions]
    require(alone == whole, "an answer earns otherwise alone")
    require(_judged(score, []) == [], "no completions have results")


def reward_tells_answers_apart(trial: Trial) -> None:
    """Some of many different answers to a question earn more than others, or nothing is learned."""
    score, completions = _ready(trial)
    for question in {id(one.question): one.question for one in completions}.values():
        mine = [one for one in completions if one.question is question]
        if len({one.value for one in _judged(score, mine)}) > 1:
            return
    require(False, "whatever is said earns the same")


def _ready(trial: Trial) -> tuple[Score, list[Completion]]:
    questions = [*questions_of(FORGET, "forget"), *questions_of(RETAIN, "boundary")]
    score = cast(Reward, trial.component).ready(questions, trial.context)
    return score, [one for question in questions for one in _said(question)]


def _said(question: Question) -> list[Completion]:
    own = f"As far as I can tell: {question.answer}."
    return [Completion(question, text, tuple(range(len(text)))) for text in (own, *SAID)]


def _judged(score: Score, completions: Sequence[Completion]) -> list[Scored]:
    return list(score(completions))
