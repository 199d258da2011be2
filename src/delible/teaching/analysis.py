"""What lessons show: how a topic went, and which moves of a teacher go with what came back.

    logit P(final question right) = b_0 + b_pre pre + b_topic + sum of b_m (number of moves m, sd 1)

fitted to right and asked final questions of every lesson and topic by iterated least squares, with
a small ridge so that separable data have an end; p-values are Wald's, held together by Holm's
method. Few lessons tell nothing: below :data:`ENOUGH` the fit is not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from delible.teaching.level import STATES

#: Lessons below which no moves are weighed.
ENOUGH = 20
#: Ridge of the fit.
RIDGE = 1e-3

Array = npt.NDArray[np.float64]


def transitions(timeline: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of times that a state follows another, by the earlier state; rows that occur sum to 1.

    Args:
        timeline: States of one topic (or fact) after every check.
    """
    counts = {state: dict.fromkeys(STATES, 0) for state in STATES}
    for earlier, later in pairwise(timeline):
        counts[earlier][later] += 1  # type: ignore[index]
    return {
        earlier: {later: count / total for later, count in row.items()}
        for earlier, row in counts.items() if (total := sum(row.values()))
    }  # fmt: skip


def slope(values: Sequence[float]) -> float | None:
    """Least-squares slope per turn; None of fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.polyfit(np.arange(len(values)), np.asarray(values, float), 1)[0])


@dataclass(frozen=True)
class Weighed:
    """What one move goes with.

    Attributes:
        weight: Log odds of a right final answer per standard deviation of the number of moves.
        p: Of there being nothing, for all moves together (Holm).
    """

    move: str
    weight: float
    error: float
    p: float


def weighed_moves(lessons: Sequence[Mapping[str, Any]]) -> list[Weighed] | str:
    """Which moves of teachers go with right final answers.

    Args:
        lessons: As :meth:`Lesson.as_data` tells them.

    Returns:
        One entry per move that occurs in different numbers; or in words why there is none.
    """
    rows = [
        (part["final"]["after"], len_of(part), part["final"]["before"], topic,
         lesson["moves"]["teacher"])
        for lesson in lessons for topic, part in lesson["topics"].items()
    ]  # fmt: skip
    if len(lessons) < ENOUGH:
        return f"{len(lessons)} lessons are too few to weigh moves: at least {ENOUGH} are needed."
    names = sorted({move for *_, moves in rows for move in moves})
    counts = np.array([[moves.get(name, 0) for name in names] for *_, moves in rows], float)
    varied = [place for place in range(len(names)) if counts[:, place].std() > 0]
    topics = sorted({topic for *_, topic, _ in rows})
    if not varied:
        return "every lesson has the same moves, so that none can be weighed."
    moves = counts[:, varied]
    moves = (moves - moves.mean(0)) / moves.std(0)
    before = np.array([[row[2]] for row in rows], float)
    dummies = np.array([[row[3] == topic for topic in topics[1:]] for row in rows], float)
    design = np.hstack([np.ones((len(rows), 1)), before, dummies, moves])
    asked = np.array([row[1] for row in rows], float)
    right = np.array([row[0] for row in rows], float) * asked
    weights, errors = logistic(design, right, asked)
    first = design.shape[1] - len(varied)
    raw = [2 * float(norm.sf(abs(w / e))) for w, e in zip(weights, errors, strict=True)][first:]
    held = holm(raw)
    return [
        Weighed(names[place], float(weights[first + at]), float(errors[first + at]), held[at])
        for at, place in enumerate(varied)
    ]


def len_of(part: Mapping[str, Any]) -> int:
    """Final questions of a topic."""
    return int(part["final"]["questions"])


def logistic(design: Array, right: Array, asked: Array) -> tuple[Array, Array]:
    """Weights and standard errors of a binomial logistic regression, by iterated least squares."""
    weights = np.zeros(design.shape[1])
    ridge = RIDGE * np.eye(design.shape[1])
    ridge[0, 0] = 0.0
    for _ in range(100):
        share = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        curvature = design.T @ (design * (asked * share * (1 - share))[:, None]) + ridge
        step = np.linalg.solve(curvature, design.T @ (right - asked * share) - ridge @ weights)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    return weights, np.sqrt(np.diag(np.linalg.inv(curvature)))


def holm(values: Sequence[float]) -> list[float]:
    """P-values for all hypotheses together, each at least its own and at most 1."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    found, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        found[place] = largest
    return found


__all__ = ["ENOUGH", "Weighed", "holm", "logistic", "slope", "transitions", "weighed_moves"]
