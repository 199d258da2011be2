"""Path dependence where it can be proved: two orders of learning in linear regression.

A stage is ridge regression held to where the last one ended,

    theta_S = (X_S' X_S + mu I)^-1 (X_S' y_S + mu theta_before),

and forgetting climbs the squared error of k forget rows at rate eta. The difference D of two
histories then obeys D_t = (I + M)^t D_0 with M = (2 eta / k) X_U' X_U, whatever the forget targets
are: histories drift apart exponentially, so that at most one of them can stay near the model
trained without the forget rows.

Paper: arXiv 2510.16629.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

#: Singular values below this share of the largest count as 0.
ZERO = 1e-10
Matrix = Float64[ndarray, "rows features"]
Vector = Float64[ndarray, " features"]
Targets = Float64[ndarray, " rows"]


def ridge_stage(features: Matrix, targets: Targets, before: Vector, strength: float) -> Vector:
    """The weights after a stage: ridge regression towards the weights before it."""
    gram = features.T @ features + strength * np.eye(features.shape[1])
    return np.asarray(np.linalg.solve(gram, features.T @ targets + strength * before))


def learned_in_order(stages: Sequence[tuple[Matrix, Targets]], strength: float) -> Vector:
    """The weights after all stages, from weights of 0."""
    theta = np.zeros(stages[0][0].shape[1])
    for features, targets in stages:
        theta = ridge_stage(features, targets, theta, strength)
    return theta


def ascent(theta: Vector, features: Matrix, targets: Targets, rate: float, steps: int) -> Vector:
    """The weights after so many steps up the mean squared error of the forget rows."""
    for _ in range(steps):
        residual = features @ theta - targets
        theta = theta + rate * 2 / len(targets) * (features.T @ residual)
    return theta


def growth(features: Matrix, rate: float) -> Float64[ndarray, "features features"]:
    """M of the module's formula: each step adds M times the difference to the difference."""
    return np.asarray(2 * rate / len(features) * features.T @ features)


def distance(first: Vector, second: Vector, tests: Matrix) -> float:
    """Mean squared difference of two models' predictions on test rows."""
    return float(np.mean(np.square(tests @ (first - second))))


@dataclass(frozen=True)
class Divergence:
    """What the theorem says about two histories.

    Attributes:
        rate: rho; the difference within the forget rows' space grows by at least 1 + rho a step.
        within: Length of the difference in that space at the start.
        sensitivity: Smallest singular value other than 0 of the test rows within that space.
        outside: Most that the difference outside of it can do to the predictions.
        tests: Test rows.
    """

    rate: float
    within: float
    sensitivity: float
    outside: float
    tests: int

    @property
    def holds_from(self) -> int:
        """The step from which on the bound holds."""
        if self.outside == 0:
            return 0
        wait = math.log(2 * self.outside / (self.sensitivity * self.within))
        return max(0, math.ceil(wait / math.log1p(self.rate)))

    def bound(self, step: int) -> float:
        """What the distance after ``step`` steps is at least, from :attr:`holds_from` on."""
        start = (self.sensitivity * self.within) ** 2 / (4 * self.tests)
        return start * (1 + self.rate) ** (2 * step)

    def steps_to_leave(self, tolerance: float) -> int:
        """The step from which on a model is farther than ``tolerance`` from the retrained one."""
        wait = math.log(16 * self.tests * tolerance)
        wait -= 2 * math.log(self.sensitivity * self.within)
        return max(self.holds_from, math.ceil(wait / (2 * math.log1p(self.rate))))


def divergence(difference: Vector, forget: Matrix, tests: Matrix, rate: float) -> Divergence | None:
    """The theorem's quantities.

    Args:
        difference: Of the two histories before forgetting.
        forget: Forget rows of full rank.
        tests: At least as many test rows.

    Returns:
        None where the histories agree in the forget rows' space: then nothing grows.
    """
    projection = forget.T @ np.linalg.solve(forget @ forget.T, forget)
    inside = projection @ difference
    length = float(np.linalg.norm(inside))
    if length <= ZERO * max(1.0, float(np.linalg.norm(difference))):
        return None
    values = np.linalg.svd(tests @ projection, compute_uv=False)
    outside = float(np.linalg.norm(difference - inside))
    return Divergence(
        rate=float(inside @ growth(forget, rate) @ inside) / length**2,
        within=length,
        sensitivity=float(values[values > ZERO * values[0]][-1]),
        outside=float(np.linalg.norm(tests, 2)) * outside,
        tests=len(tests),
    )


@dataclass(frozen=True)
class Example:
    """Two stages A and B, forget rows (part of B), test rows; all drawn from a seed."""

    first: tuple[Matrix, Targets]
    second: tuple[Matrix, Targets]
    forget: tuple[Matrix, Targets]
    tests: Matrix

    @classmethod
    def drawn(cls, seed: int, features: int = 24, rows: int = 8, forget: int = 4) -> Example:
        """Standard normal rows and targets, fewer of them than features."""
        draw = np.random.default_rng(seed)

        def stage() -> tuple[Matrix, Targets]:
            return draw.standard_normal((rows, features)), draw.standard_normal(rows)

        first, second = stage(), stage()
        gone = (second[0][:forget], second[1][:forget])
        return cls(first, second, gone, draw.standard_normal((2 * rows, features)))

    def histories(self, strength: float) -> tuple[Vector, Vector]:
        """The weights after A then B, and after B then A."""
        return (
            learned_in_order((self.first, self.second), strength),
            learned_in_order((self.second, self.first), strength),
        )

    def curve(self, strength: float, rate: float, steps: int) -> list[float]:
        """The distance of the two histories after 0, 1, … steps of forgetting."""
        one, two = self.histories(strength)
        found = [distance(one, two, self.tests)]
        for _ in range(steps):
            one, two = (ascent(theta, *self.forget, rate, 1) for theta in (one, two))
            found.append(distance(one, two, self.tests))
        return found


__all__ = [
    "Divergence", "Example", "ascent", "distance", "divergence", "growth", "learned_in_order",
    "ridge_stage",
]  # fmt: skip
