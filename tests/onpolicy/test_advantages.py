"""Advantages, divergence and its weight, against a second derivation in plain Python."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from delible.train.onpolicy.advantages import (
    adapted,
    advantages,
    divergence,
    k3,
    temperature,
)

GROUPS = [[0.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.1]]
FLAT = [one for group in GROUPS for one in group]


def test_group_scores_by_hand() -> None:
    found = advantages(FLAT, 4, "group")
    wanted = []
    for group in GROUPS:
        spread = statistics.stdev(group)
        mean = statistics.mean(group)
        wanted += [(one - mean) / (spread + 1e-6) if spread else 0.0 for one in group]
    assert found.values == pytest.approx(wanted, abs=1e-12)
    assert (found.equal, found.groups) == (1, 3)


def test_equal_rewards_give_exactly_nothing() -> None:
    for kind in ("group", "centred", "tempered", "whitened"):
        found = advantages([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2], 4, kind, [3, 1, 4, 1])
        assert found.values == [0.0] * 4
        assert found.equal == 1


def test_centred_by_hand() -> None:
    found = advantages([0.0, 1.0, 0.5, 0.7], 4, "centred")
    assert found.values == pytest.approx([-0.55, 0.45, -0.05, 0.15], abs=1e-12)


def test_whitened_counts_every_token() -> None:
    rewards, lengths = [0.0, 1.0, 0.25, 0.5], [1, 4, 2, 3]
    tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    mean, spread = statistics.mean(tokens), statistics.stdev(tokens)
    found = advantages(rewards, 2, "whitened", lengths)
    assert found.values == pytest.approx([(r - mean) / (spread + 1e-8) for r in rewards], abs=1e-12)


@pytest.mark.parametrize("kind", ["group", "centred", "tempered", "whitened"])
def test_what_has_no_value_is_in_no_mean(kind: str) -> None:
    with_gap = advantages([0.0, None, 1.0, 0.4], 4, kind, [2, 9, 3, 4])  # type: ignore[arg-type]
    without = advantages([0.0, 1.0, 0.4], 3, kind, [2, 3, 4])  # type: ignore[arg-type]
    assert with_gap.values[1] == 0.0
    rest = [with_gap.values[place] for place in (0, 2, 3)]
    assert rest == pytest.approx(without.values, abs=1e-12)
    alone = advantages([0.5, None, None, None], 4, kind, [1, 1, 1, 1])  # type: ignore[arg-type]
    assert alone.values == [0.0] * 4
    assert alone.equal == 1


def test_tempered_by_hand_at_its_temperature() -> None:
    rewards = [0.0, 0.3, 1.0, 0.9]
    beta = temperature(np.array(rewards))
    shares = [math.exp(beta * one) for one in rewards]
    shares = [one / sum(shares) for one in shares]
    reached = sum(one * math.log(one * len(rewards)) for one in shares)
    assert reached == pytest.approx(math.log(2), abs=1e-6)
    weights = [math.exp(beta * (one - 1.0)) for one in rewards]
    wanted = [w / ((sum(weights) - w) / 3 + 1e-8) - 1 for w in weights]
    assert advantages(rewards, 4, "tempered").values == pytest.approx(wanted, abs=1e-9)


def test_temperature_at_its_ends() -> None:
    assert temperature(np.array([0.5, 0.5, 0.5])) == 0.1
    # of two, one can hold ln 2 at most, which only an infinite beta would reach
    assert temperature(np.array([0.0, 1e-3])) == 100.0
    assert temperature(np.array([0.0, 0.0, 0.0, 900.0])) == 0.1
    assert divergence(np.array([0.0, 1.0]), 0.0) == pytest.approx(0.0, abs=1e-12)


def test_small_temperatures_sum_to_nothing() -> None:
    rewards = np.array([0.0, 0.3, 1.0, 0.9])
    for beta, bound in ((1e-2, 1e-3), (1e-3, 1e-5)):
        weights = np.exp(beta * (rewards - 1.0))
        found = weights / ((weights.sum() - weights) / 3 + 1e-8) - 1
        assert abs(found.sum()) < bound


def test_k3_is_zero_only_where_both_agree() -> None:
    policy = np.array([-0.5, -1.0, -3.0])
    assert k3(policy, policy).tolist() == [0.0, 0.0, 0.0]
    apart = np.array([0.7, -0.3, 1e-3])
    wanted = [math.exp(d) - d - 1 for d in apart]
    assert k3(policy, policy + apart).tolist() == pytest.approx(wanted, abs=1e-12)
    assert (k3(policy, policy + apart) > 0).all()
    value = torch.tensor(policy, requires_grad=True)
    (torch.exp(torch.tensor(policy) - value) - (torch.tensor(policy) - value) - 1).sum().backward()
    assert value.grad is not None
    assert value.grad.abs().max() == 0


def test_the_weight_follows_the_divergence() -> None:
    assert adapted(0.1, 0.2, 0.1, 10) == pytest.approx(0.1 * (1 + 0.2 / 10))  # at most 20 %
    assert adapted(0.1, 0.105, 0.1, 10) == pytest.approx(0.1 * (1 + 0.05 / 10))
    assert adapted(0.1, 0.0, 0.1, 10) == pytest.approx(0.1 * (1 - 0.2 / 10))
    assert adapted(0.1, 0.1, 0.1, 10) == pytest.approx(0.1)
