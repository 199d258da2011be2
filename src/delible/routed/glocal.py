"""Whether a text is like those of a request, from its features alone (glocal scores of O3).

For layer l with features f, mean mu and covariance Sigma over the request's texts:

    d_maha = -1/2 (f - mu)^T Sigma^-1 (f - mu)      d_cos = - max_j cos(f, bank_j)
    s_l = d_maha + gamma d_cos                      one number per layer
    d = w . s - rho                                 a linear one-class SVM over the layers
    F = 1/2 N(m1, sd) + 1/2 N(m2, sd),  x0 = (m1 + m2) / 2,  p = F(d),  p' = F(2 x0 - d)
    c = 1 - max(p, p') + min(p, p'),    weight = sigmoid(zeta c - b)

m1 is the mean of d over the texts that the statistics were made of, m2 and sd those of texts that
were held out. The weight is largest at x0 and the same at both sides of it.

Paper: arXiv 2407.10223 (O3). Reference code: github.com/GCYZSL/O3-LLM-UNLEARNING. Deviations: the
covariance of few texts has no inverse, so it is shrunk towards a multiple of the identity; in the
paper d_maha falls and gamma d_cos rises for a text that is far away, so the two partly cancel:
``sign = 1`` makes both rise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.special import expit, ndtr

Array = npt.NDArray[np.float64]
#: Below it a length or a spread is none.
TINY = 1e-12


@dataclass(frozen=True)
class Layer:
    """What is known of a request's features at one layer.

    Attributes:
        mean: Of them.
        basis: Directions in which they spread; the rest of the space has the variance ``floor``.
        variances: Of the shrunk covariance, along the basis.
        floor: And everywhere else.
        bank: The features, each of length 1.
    """

    mean: Float[Array, " hidden"]
    basis: Float[Array, "direction hidden"]
    variances: Float[Array, " direction"]
    floor: float
    bank: Float[Array, "text hidden"]

    @classmethod
    def of(cls, features: Float[Array, "text hidden"], shrinkage: float) -> Layer:
        """Statistics of features.

        Args:
            shrinkage: a of (1 - a) Sigma + a tr(Sigma) / hidden I, in (0, 1].
        """
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        _, sizes, basis = np.linalg.svd(centred, full_matrices=False)
        variances = sizes**2 / len(features)
        floor = max(shrinkage * float(variances.sum()) / features.shape[1], TINY)
        return cls(mean, basis, (1 - shrinkage) * variances + floor, floor, _unit(features))

    def mahalanobis(self, features: Float[Array, "text hidden"]) -> Float[Array, " text"]:
        """(f - mu)^T Sigma^-1 (f - mu) of each text, with the shrunk covariance; from 0."""
        away = np.asarray(features, dtype=np.float64) - self.mean
        along = away @ self.basis.T
        rest = np.maximum((away**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        found: Array = (along**2 / self.variances).sum(axis=1) + rest / self.floor
        return found

    def likeness(self, features: Float[Array, "text hidden"]) -> Float[Array, " text"]:
        """The largest cosine to a text of the bank, in [-1, 1]."""
        found: Array = (_unit(np.asarray(features, dtype=np.float64)) @ self.bank.T).max(axis=1)
        return found

    def scores(
        self, features: Float[Array, "text hidden"], gamma: float, sign: float
    ) -> Float[Array, " text"]:
        """s of each text: ``sign`` times half the Mahalanobis distance, minus gamma cosines."""
        return sign * 0.5 * self.mahalanobis(features) - gamma * self.likeness(features)


def _unit(features: Array) -> Array:
    found: Array = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), TINY)
    return found


def one_class(
    points: Float[Array, "text layer"],
    nu: float,
    *,
    sweeps: int = 100_000,
    tolerance: float = 1e-10,
) -> tuple[Float[Array, " layer"], float]:
    """The linear one-class SVM: w and rho of the decision w . x - rho.

    Minimises 1/2 |w|^2 - rho + 1 / (nu n) sum_i max(0, rho - w . x_i), in its dual: min 1/2 |sum_i
    a_i x_i|^2 with 0 <= a_i <= 1 / (nu n) and sum a = 1, by the pair of points that breaks the
    conditions most (Scholkopf et al. 2001). Points are scaled to a mean square of 1, so that the
    tolerance means the same for all; w and rho are those of the points as given.

    Args:
        nu: Bound of the share of points outside, in (0, 1].
    """
    points = np.asarray(points, dtype=np.float64)
    unit = max(float(np.sqrt((points**2).sum(axis=1).mean())), TINY)
    scaled = points / unit
    count = len(points)
    bound = max(1.0 / (nu * count), 1.0 / count)
    weights = np.zeros(count)
    full = int(1.0 / bound)
    weights[:full] = bound
    if full < count:
        weights[full] = 1.0 - full * bound
    kernel = scaled @ scaled.T
    gradient = kernel @ weights
    for _ in range(sweeps):
        up, down = weights < bound - TINY, weights > TINY
        low = int(np.where(up, gradient, np.inf).argmin())
        high = int(np.where(down, gradient, -np.inf).argmax())
        gap = gradient[high] - gradient[low]
        if gap <= tolerance:
            break
        curve = max(kernel[low, low] + kernel[high, high] - 2 * kernel[low, high], TINY)
        step = min(gap / curve, bound - weights[low], weights[high])
        weights[low] += step
        weights[high] -= step
        gradient += step * (kernel[:, low] - kernel[:, high])
    inside = (weights > TINY) & (weights < bound - TINY)
    if inside.any():
        rho = float(gradient[inside].mean())
    else:  # between the two kinds of points at a bound
        lower = gradient[weights >= bound - TINY].max()
        upper = gradient[weights <= TINY].min() if (weights <= TINY).any() else lower
        rho = float((lower + upper) / 2)
    return weights @ points, rho * unit**2


def soft_weight(
    distance: Float[Array, " text"], used: float, held: float, spread: float, *,
    zeta: float = 10.0, offset: float = 2.0,
) -> Float[Array, " text"]:  # fmt: skip
    """How much of an adapter a text gets, in (sigmoid(-b), sigmoid(zeta - b)].

    Args:
        distance: d of each text.
        used, held: m1 and m2.
        spread: The standard deviation of both parts of the mixture.
        zeta, offset: How sharply it falls, and how low (b).
    """
    centre = (used + held) / 2
    distance = np.asarray(distance, dtype=np.float64)
    one, other = (_mixture(x, used, held, spread) for x in (distance, 2 * centre - distance))
    closeness = 1 - np.maximum(one, other) + np.minimum(one, other)
    found: Array = expit(zeta * closeness - offset)
    return found


def _mixture(value: Array, used: float, held: float, spread: float) -> Any:
    spread = max(spread, TINY)
    return 0.5 * ndtr((value - used) / spread) + 0.5 * ndtr((value - held) / spread)


__all__ = ["Layer", "one_class", "soft_weight"]
