"""Models with a history, and what happens to them step by step while they forget.

For experiments on how a result depends on the way there: chains of fine-tuning stages (each
kept in the cache, shared beginnings trained once) and trajectories of an unlearning run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from delible.api import unlearn
from delible.bench.prepare import learned
from delible.lm.lm import LM
from delible.measure.engine import measure
from delible.records import ForgetRequest, Record, RecordBase
from delible.resolving import recipe_named
from delible.system.asks import Distribution, Score, TokenScores
from delible.system.questions import answer_of, ask
from delible.train.recipe import Recipe

Found = TypeVar("Found")
Kind = TypeVar("Kind", bound=RecordBase)
Logprobs = npt.NDArray[np.float32]


def learned_in_stages(
    model: str,
    stages: Mapping[str, Sequence[Record]],
    order: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]],
    seed: int = 0,
) -> str:
    """The folder of a model that has learned stages one after the other.

    Optimiser and schedule begin anew with each stage. Every stage lies in the cache, so orders
    with a common beginning share it.

    Args:
        stages: Records by the stage's name.
        order: Names; none gives the model as it is.
        options: Of the method ``finetune``, by the stage's name.
    """
    for name in order:
        model = str(learned(model, stages[name], options=options[name], seed=seed, title=name))
    return model


def forgetting(
    method: str, options: Mapping[str, Any], *, keep: bool, extra: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe under an experiment's budget.

    Args:
        method: A recipe's name or file.
        options: Training options, the same for every method.
        keep: Leave the retain loss in.
        extra: Options of this method alone.

    Raises:
        RecipeError: An unknown method, or one without training steps.
    """
    return recipe_named(
        method, "there is nothing to follow",
        slots={} if keep else {"keep": "none"}, options={**options, **(extra or {})},
    )  # fmt: skip


def trajectory(
    lm: LM,
    request: ForgetRequest,
    recipe: Recipe,
    look: Callable[[LM], Found],
    *,
    every: int,
    seed: int = 0,
) -> tuple[list[tuple[int, Found]], str | None]:
    """What a look at the model shows before, during and after unlearning.

    Args:
        lm: The model; changed in place.
        look: Asks the model something; must leave it as it is.
        every: Steps between two looks.

    Returns:
        (steps taken, what was seen) at 0, every so many steps and at the end; and why training
        stopped early, if it did.
    """
    points = [(0, look(lm))]

    def step_done(step: int, total: int, numbers: Mapping[str, float]) -> None:
        if step % every == 0 and step < total:
            points.append((step, look(lm)))

    result = unlearn(
        lm, request, method=recipe, seed=seed, shown=0, measured=False, progress=step_done
    )
    last = len(result.history)
    points = [point for point in points if point[0] < max(1, last)]  # a finisher may change the end
    points.append((last, look(result.model)))
    return points, result.stopped


# ---- what can be seen


def spaced(records: Sequence[Kind], count: int) -> list[Kind]:
    """At most ``count`` records, evenly spaced over all of them."""
    if len(records) <= count:
        return list(records)
    return [records[place * len(records) // count] for place in range(count)]


def _logprobs(lm: LM, asked: Sequence[Score]) -> list[npt.NDArray[np.float32] | None]:
    answers = measure(lm, asked)
    found = [answers[request] for request in asked]
    return [
        one.logprobs if isinstance(one, TokenScores) and len(one.logprobs) else None
        for one in found
    ]


def token_means(lm: LM, asked: Sequence[Score]) -> list[float | None]:
    """Mean log-probability per token of each answer; None where the model gives no numbers."""
    return [None if row is None else float(row.mean()) for row in _logprobs(lm, asked)]


def token_sums(lm: LM, asked: Sequence[Score]) -> list[float | None]:
    """Log-probability of each whole answer; None where the model gives no numbers."""
    return [None if row is None else float(row.sum()) for row in _logprobs(lm, asked)]


def scores_of(records: Sequence[RecordBase], answer: str | None = None) -> list[Score]:
    """How likely is each record's answer, or one and the same answer, after its question?"""
    found = []
    for record in records:
        prompt = ask(record)
        if prompt is not None:
            found.append(Score(prompt, answer_of(record) if answer is None else answer))
    return found


def distributions(lm: LM, asked: Sequence[Score]) -> Logprobs:
    """All log-probabilities at all answers' tokens, [positions, vocabulary]; NaN where none.

    A request that cannot be answered is one row of NaN, so that nobody takes it for agreement.
    """
    requests = [Distribution(one.prompt, one.answer) for one in asked]
    answers = measure(lm, requests)
    nothing = np.full((1, lm.vocabulary), np.nan, np.float32)
    rows = [
        answer if isinstance(answer := answers[request], np.ndarray) else nothing
        for request in requests
    ]
    return np.concatenate(rows).astype(np.float32)


def kl(first: Logprobs, second: Logprobs) -> float | None:
    """KL(first || second) in nats, the mean over positions; log-probabilities as [positions, V].

    None where a model gave no numbers, or the positions are not the same ones.
    """
    if first.shape != second.shape or not (np.isfinite(first).any() and np.isfinite(second).any()):
        return None
    one, two = first.astype(np.float64), second.astype(np.float64)
    share = np.exp(one)
    with np.errstate(invalid="ignore"):  # 0 times (-inf - -inf)
        terms = np.where(share == 0, 0.0, share * (one - two))
    value = float(terms.sum(axis=1).mean())
    return max(0.0, value) if math.isfinite(value) else None


def apart(first: Logprobs, second: Logprobs) -> float | None:
    """The mean of both directions' KL divergence in nats."""
    there, back = kl(first, second), kl(second, first)
    return None if there is None or back is None else (there + back) / 2


# ---- curves


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values there are; None without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def spread(values: Sequence[float | None]) -> float | None:
    """Largest minus smallest; None unless there are two."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) > 1 else None


def first_crossing(curve: Sequence[float | None], level: float) -> float | None:
    """Where a curve first reaches a level, in points from 0, between points by straight lines.

    None if it never does.
    """
    before: tuple[int, float] | None = None
    for place, value in enumerate(curve):
        if value is None:
            continue
        if value >= level:
            if before is None or value == before[1]:
                return float(place)
            start, low = before
            return start + (place - start) * (level - low) / (value - low)
        before = place, value
    return None


def at(curve: Sequence[float | None], place: float) -> float | None:
    """The curve's value between points, by a straight line."""
    low, share = int(place), place - int(place)
    here = curve[low]
    if share == 0 or here is None:
        return here
    there = curve[low + 1]
    return None if there is None else (1 - share) * here + share * there


def curve_distance(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Mean absolute difference of two curves over the points that both have."""
    both = zip(first, second, strict=False)
    return mean([abs(one - two) for one, two in both if one is not None and two is not None])


__all__ = [
    "apart", "at", "curve_distance", "distributions", "first_crossing", "forgetting", "kl",
    "learned_in_stages", "mean", "scores_of", "spaced", "spread", "token_means", "token_sums",
    "trajectory",
]  # fmt: skip
