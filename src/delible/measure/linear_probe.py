"""A linear probe: logistic regression with a penalty, in float64, solved to the end.

    min over w, b of   sum_i log(1 + exp(-y_i (w x_i + b))) + penalty / 2 |w|^2,    y_i = -1 or 1

Features are first centred and scaled by what they are on the training rows. The minimum is the
only one, so nothing is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        centre: Mean of each feature on the training rows.
        scale: Its standard deviation there; 1 where it is still.
        weights: Of the features so scaled.
        bias: The constant.
    """

    centre: Float[np.ndarray, " feature"]
    scale: Float[np.ndarray, " feature"]
    weights: Float[np.ndarray, " feature"]
    bias: float

    def __call__(self, features: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, " row"]:
        """Log odds that a row is true."""
        scaled = (features.astype(np.float64) - self.centre) / self.scale
        found: Float[np.ndarray, " row"] = scaled @ self.weights + self.bias
        return found


def fit_probe(
    features: Float[np.ndarray, "row feature"], labels: Bool[np.ndarray, " row"], penalty: float
) -> Probe:
    """The probe with the smallest loss.

    Args:
        features: Finite numbers.
        labels: True or false, both of them.
        penalty: Of the squared weights, above 0; the bias is free.
    """
    x = features.astype(np.float64)
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-8 * max(1.0, float(np.abs(x).max()))] = 1.0
    x = (x - centre) / scale
    signs = np.where(labels, 1.0, -1.0)

    def loss(point: Float[np.ndarray, " all"]) -> tuple[float, Float[np.ndarray, " all"]]:
        weights, bias = point[:-1], point[-1]
        margins = signs * (x @ weights + bias)
        slopes = -signs / (1 + np.exp(np.clip(margins, -500, 500)))
        value = float(np.logaddexp(0, -margins).sum() + penalty / 2 * weights @ weights)
        return value, np.append(x.T @ slopes + penalty * weights, slopes.sum())

    found = minimize(
        loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B",
        options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9},
    ).x  # fmt: skip
    return Probe(centre, scale, found[:-1], float(found[-1]))
