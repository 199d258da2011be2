"""From rewards to advantages, and how far a model may go from its reference. Pure functions.

    group        A_i = (r_i - mean) / (std + 1e-6), std with n - 1
    centred      A_i = r_i - mean
    whitened     A_i = (r_i - mean_t) / (std_t + 1e-8), over all tokens of the batch (REINFORCE++)
    tempered     A_i = w_i / (mean of the others' w + 1e-8) - 1, w_i = exp(beta (r_i - max r)),
                 beta such that KL(softmax(beta r) || uniform) = ln 2, within [0.1, 100]

Completions without a value are in no mean and get 0. A group whose rewards are equal gets exactly
0: nothing is learned from it.

Papers: arXiv 2402.03300 (group), 2503.20783 (centred), 2501.03262 (whitened), 2604.05716
(tempered). Deviation: in released code a group of equal rewards gets 0 / eps, which is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["group", "centred", "whitened", "tempered"]
Array = npt.NDArray[np.float64]

#: Added to a group's spread, and to sums over the others.
EPSILON, SMALL = 1e-6, 1e-8
#: Where the temperature of ``tempered`` is looked for, and the divergence that it must reach.
LEAST_BETA, LARGEST_BETA, WANTED = 0.1, 100.0, math.log(2)
#: Rewards this close are equal.
EQUAL = 1e-9


@dataclass(frozen=True)
class Advantages:
    """Advantages of one step.

    Attributes:
        values: One per completion, in order.
        equal: Groups whose rewards are all equal, or of which fewer than two have a value.
        groups: All groups.
    """

    values: list[float]
    equal: int
    groups: int


def advantages(
    rewards: Sequence[float | None], size: int, kind: Kind, lengths: Sequence[int] = ()
) -> Advantages:
    """Advantages of completions in groups of ``size``, one group after the other.

    Args:
        rewards: None: no value.
        lengths: Tokens of each completion, for ``whitened``.
    """
    values = np.array([math.nan if one is None else float(one) for one in rewards])
    groups = values.reshape(-1, size)
    flat = [_equal(group) for group in groups]
    if kind == "whitened":
        found = whitened(values, np.array(lengths, dtype=float))
    else:
        one = {"group": grouped, "centred": centred, "tempered": tempered}[kind]
        rows = [np.zeros(size) if same else one(group) for group, same in zip(groups, flat,
                strict=True)]  # fmt: skip
        found = np.concatenate(rows) if rows else np.zeros(0)
    found = np.where(np.isnan(values), 0.0, np.nan_to_num(found))
    return Advantages([float(one) for one in found], sum(flat), len(flat))


def _equal(group: Array) -> bool:
    known = group[~np.isnan(group)]
    return len(known) < 2 or bool(known.max() - known.min() <= EQUAL)


def grouped(rewards: Array) -> Array:
    """Standard scores within a group; NaN is left out of mean and spread."""
    return (rewards - np.nanmean(rewards)) / (np.nanstd(rewards, ddof=1) + EPSILON)


def centred(rewards: Array) -> Array:
    """Differences from a group's mean."""
    return rewards - np.nanmean(rewards)


def whitened(rewards: Array, lengths: Array) -> Array:
    """Standard scores over all tokens of a batch, each of which has its completion's reward."""
    known = ~np.isnan(rewards)
    weights = np.where(known, lengths, 0.0)
    total = weights.sum()
    if total <= 0:
        return np.zeros_like(rewards)
    filled = np.where(known, rewards, 0.0)
    mean = (weights * filled).sum() / total
    variance = (weights * (filled - mean) ** 2).sum() / max(total - 1, 1)
    if variance <= EQUAL**2:
        return np.zeros_like(rewards)
    return (filled - mean) / (math.sqrt(variance) + SMALL)


def tempered(rewards: Array) -> Array:
    """How much better each is than the others, at a temperature that fits the group."""
    known = ~np.isnan(rewards)
    own = rewards[known]
    weights = np.exp(temperature(own) * (own - own.max()))
    others = (weights.sum() - weights) / (len(weights) - 1)
    found = np.full_like(rewards, math.nan)
    found[known] = weights / (others + SMALL) - 1
    return found


def divergence(rewards: Array, beta: float) -> float:
    """KL(softmax(beta r) || uniform), in nats."""
    scaled = beta * (rewards - rewards.max())
    shares = np.exp(scaled) / np.exp(scaled).sum()
    return float((shares * (np.log(np.maximum(shares, 1e-300)) + math.log(len(rewards)))).sum())


def temperature(rewards: Array, wanted: float = WANTED) -> float:
    """The beta at which the rewards' softmax is ``wanted`` nats from uniform, by bisection.

    The nearest end of the range where none is; the smallest one where all rewards are equal.
    """
    low, high = LEAST_BETA, LARGEST_BETA
    if rewards.max() - rewards.min() <= EQUAL or divergence(rewards, low) >= wanted:
        return low
    if divergence(rewards, high) <= wanted:
        return high
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(rewards, middle) < wanted else (low, middle)
    return math.sqrt(low * high)


def k3(policy: Array, reference: Array) -> Array:
    """The estimate of KL(policy || reference) per token: e^d - d - 1, d = reference - policy."""
    apart = reference - policy
    return np.expm1(apart) - apart


def adapted(weight: float, measured: float, wanted: float, horizon: float) -> float:
    """The weight of the KL term after a step in which it was ``measured`` (arXiv 1909.08593).

    It grows while the model is further away than ``wanted``, at most by 20 % in ``horizon`` steps.
    """
    error = min(0.2, max(-0.2, measured / wanted - 1))
    return weight * (1 + error / horizon)


__all__ = ["Advantages", "Kind", "adapted", "advantages", "k3", "temperature"]
