"""The closed forms against full linear systems in float64, written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delible.edit.closed_form import (
    factors,
    identity,
    inverse,
    projector,
    rank_one,
    sparing,
    squares,
)

WIDTH, HIDDEN = 20, 6


def keys_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, count, generator=generator, dtype=torch.float64)


def moment_of(tokens: int = 60) -> Tensor:
    keys = keys_of(tokens, 1) * torch.linspace(3, 0.1, WIDTH, dtype=torch.float64)[:, None]
    return keys @ keys.T / tokens


def basis(directions: int = 9) -> Tensor:
    return torch.linalg.qr(keys_of(WIDTH, 2)).Q[:, :directions]


def damped(moment: Tensor, ridge: float) -> Tensor:
    return moment + ridge * moment.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)


# ---- B = C^-1


@pytest.mark.parametrize("weight", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("edits", [1, 4])
@pytest.mark.parametrize("earlier", [0, 5])
def test_factors_solve_the_system_with_second_moment_and_earlier_keys(
    earlier: int, edits: int, weight: float
) -> None:
    keys, old, moment = keys_of(edits), keys_of(earlier, 5), damped(moment_of(), 0.01)
    residual = torch.randn(HIDDEN, edits, dtype=torch.float64)
    full = residual @ keys.T @ torch.linalg.inv(weight * moment + old @ old.T + keys @ keys.T)
    found = residual @ factors(keys, inverse(moment_of(), 0.01), weight, old).T
    torch.testing.assert_close(found, full, rtol=1e-8, atol=1e-10)


def test_a_small_weight_writes_all_and_a_large_one_nothing() -> None:
    keys, residual = keys_of(3), torch.randn(HIDDEN, 3, dtype=torch.float64)
    within = inverse(moment_of(), 0.01)
    sizes, missed = [], []
    for weight in (1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9):
        delta = residual @ factors(keys, within, weight).T
        sizes.append(float(delta.norm()))
        missed.append(float((delta @ keys - residual).norm() / residual.norm()))
    assert missed == sorted(missed)
    assert sizes == sorted(sizes, reverse=True)
    assert missed[0] < 1e-4
    assert sizes[-1] < 1e-4 * sizes[0]


def test_the_inverse_has_a_ridge_of_the_mean_eigenvalue() -> None:
    flat = torch.zeros(WIDTH, WIDTH)
    flat[0, 0] = 4.0  # one direction only: no inverse without a ridge
    found = inverse(flat, 0.1)(torch.eye(WIDTH, dtype=torch.float64))
    expected = torch.full((WIDTH,), 1 / (0.1 * 4 / WIDTH), dtype=torch.float64)
    expected[0] = 1 / (4 + 0.1 * 4 / WIDTH)
    torch.testing.assert_close(found, torch.diag(expected))


# ---- B = P


@pytest.mark.parametrize("l2", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("earlier", [0, 5])
def test_factors_solve_the_system_with_null_space_and_earlier_keys(earlier: int, l2: float) -> None:
    keys, old, null = keys_of(3), keys_of(earlier, 5), basis()
    projection = null @ null.T
    residual = torch.randn(HIDDEN, 3, dtype=torch.float64)
    left = projection @ (keys @ keys.T + old @ old.T) + l2 * torch.eye(WIDTH, dtype=torch.float64)
    full = torch.linalg.solve(left, projection @ keys @ residual.T).T
    found = residual @ factors(keys, projector(null), l2, old).T
    torch.testing.assert_close(found, full, rtol=1e-8, atol=1e-10)


def test_nothing_is_written_outside_of_the_null_space() -> None:
    null = basis()
    delta = torch.randn(HIDDEN, 4).double() @ factors(keys_of(4), projector(null), 0.1).T
    outside = torch.eye(WIDTH, dtype=torch.float64) - null @ null.T
    assert float((delta @ outside).norm()) < 1e-5 * float(delta.norm())


def test_earlier_keys_are_left_alone() -> None:
    keys, old = keys_of(2), keys_of(3, 7)
    residual = torch.randn(HIDDEN, 2, dtype=torch.float64)
    within = projector(basis(15))
    alone = residual @ factors(keys, within, 1e-6).T
    beside = residual @ factors(keys, within, 1e-6, old).T
    assert float((alone @ old).norm()) > 0.1
    assert float((beside @ old).norm()) < 1e-3 * float((alone @ old).norm())
    torch.testing.assert_close(beside @ keys, residual, rtol=1e-4, atol=1e-4)


# ---- rank one


@pytest.mark.parametrize("covariance", [True, False])
def test_rank_one_is_the_least_change_that_meets_the_value(covariance: bool) -> None:
    """The least of tr(D C D^T) under D k = r, by its Lagrange conditions."""
    key, residual = keys_of(1)[:, 0], torch.randn(HIDDEN, dtype=torch.float64)
    moment = damped(moment_of(), 0.01)
    within = inverse(moment_of(), 0.01) if covariance else identity()
    delta = torch.outer(residual, rank_one(key, key, within))
    torch.testing.assert_close(delta @ key, residual)
    metric = moment if covariance else torch.eye(WIDTH, dtype=torch.float64)
    multiplier = delta @ metric  # = lambda k^T: each row is a multiple of k
    expected = torch.outer(multiplier @ key / key.square().sum(), key)
    torch.testing.assert_close(multiplier, expected)
    assert float(torch.linalg.svdvals(delta)[1] / torch.linalg.svdvals(delta)[0]) < 1e-12


def test_rank_one_takes_its_direction_from_the_mean_key() -> None:
    mean, key = keys_of(2).T
    within = inverse(moment_of(), 0.01)
    expected = torch.linalg.solve(damped(moment_of(), 0.01), mean)
    torch.testing.assert_close(rank_one(mean, key, within), expected / (expected @ key))
    assert not bool(rank_one(torch.zeros(WIDTH), key, within).any())


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("weight", [0.5, 20.0])
def test_earlier_keys_join_the_second_moment(weight: float, covariance: bool) -> None:
    old, (mean, key) = keys_of(4, 7), keys_of(2).T
    metric = damped(moment_of(), 0.01) if covariance else torch.eye(WIDTH, dtype=torch.float64)
    within = inverse(moment_of(), 0.01) if covariance else identity()
    joined = metric.clone()
    for one in old.T:
        joined += weight * torch.outer(one, one) / (one @ torch.linalg.solve(metric, one))
    spared = sparing(within, old, weight)
    torch.testing.assert_close(spared(keys_of(2)), torch.linalg.solve(joined, keys_of(2)))
    direction = torch.linalg.solve(joined, mean)
    found = rank_one(mean, key, spared)
    torch.testing.assert_close(found, direction / (direction @ key))
    alone = rank_one(mean, key, sparing(within, old[:, :1], weight)) @ old[:, 0]
    free = torch.linalg.solve(metric, mean)
    shared = torch.linalg.solve(metric, old[:, 0]) @ mean / (1 + weight)
    power = key @ torch.linalg.solve(joined_with(metric, old[:, 0], weight), mean)
    assert float(alone) == pytest.approx(float(shared / power))
    assert not torch.allclose(free / (free @ key), found)
    assert sparing(within, old, 0) is within
    assert sparing(within, old[:, :0], weight) is within


def joined_with(metric: Tensor, key: Tensor, weight: float) -> Tensor:
    return metric + weight * torch.outer(key, key) / (key @ torch.linalg.solve(metric, key))


def test_squares() -> None:
    keys, null = keys_of(3), basis()
    expected = torch.stack([key @ (null @ null.T) @ key for key in keys.T])
    torch.testing.assert_close(squares(keys, projector(null)), expected)
