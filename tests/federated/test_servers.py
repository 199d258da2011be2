"""What a server does with adapters, against sums made by hand in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from delible.errors import RecipeError, RunError
from delible.federated.adapter import bytes_of, misfit
from delible.federated.servers import (
    Moments,
    Server,
    mean_change,
    mean_product,
    shares,
    step,
    update,
)

EVERY = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")


def drawn(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "x.lora_A.default.weight": scale * torch.randn(2, 5, generator=random),
        "x.lora_B.default.weight": scale * torch.randn(4, 2, generator=random),
    }


def clients(start: dict[str, torch.Tensor], sizes=(0.5, 2.0, 0.02)) -> dict:
    return {
        name: {key: start[key] + change for key, change in drawn(seed, size).items()}
        for seed, (name, size) in enumerate(zip("cab", sizes, strict=True), start=1)
    }


def by_hand(name: str, deltas: list[np.ndarray], start: np.ndarray) -> list[np.ndarray]:
    """The server's adapter after each round, entry by entry, as the sheet of rules has it."""
    b1, b2, tau, eta, mu = 0.9, 0.99, 1e-3, 1e-3, 0.9
    out = []
    phi = [float(value) for value in start.ravel()]
    m = [None] * len(phi)
    v = [tau * tau] * len(phi)
    for delta in deltas:
        for i, d in enumerate(float(value) for value in delta.ravel()):
            if name in ("fedavg", "fedprox"):
                phi[i] += d
            elif name == "fedavgm":
                m[i] = d if m[i] is None else mu * m[i] + d
                phi[i] += m[i]
            elif name == "fedadagrad":
                v[i] += d * d
                phi[i] += eta * d / (math.sqrt(v[i]) + tau)
            else:
                m[i] = d if m[i] is None else b1 * m[i] + (1 - b1) * d
                if name == "fedadam":
                    v[i] = b2 * v[i] + (1 - b2) * m[i] ** 2
                else:
                    gap = v[i] - m[i] ** 2
                    v[i] -= (1 - b2) * m[i] ** 2 * ((gap > 0) - (gap < 0))
                phi[i] += eta * m[i] / (math.sqrt(v[i]) + tau)
        out.append(np.array(phi).reshape(start.shape))
    return out


def test_shares_are_of_rows_and_sum_to_one() -> None:
    found = shares({"a": 30, "b": 10, "c": 60})
    assert found == pytest.approx({"a": 0.3, "b": 0.1, "c": 0.6})
    assert math.isclose(sum(found.values()), 1)
    with pytest.raises(RunError, match="no rows"):
        shares({"a": 0})


def test_fedavg_is_the_weighted_mean() -> None:
    start = drawn(0)
    given, weights = clients(start), {"a": 0.5, "b": 0.3, "c": 0.2}
    found, _ = update(Server(), start, given, weights, Moments())
    for name in start:
        expected = sum(w * given[c][name].numpy().astype(np.float64) for c, w in weights.items())
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-6)


def test_no_order_of_clients_matters() -> None:
    start = drawn(0)
    given, weights = clients(start), {"a": 0.5, "b": 0.3, "c": 0.2}
    first, _ = update(Server(), start, given, weights, Moments())
    for order in itertools.permutations(given):
        other, _ = update(Server(), start, {c: given[c] for c in order}, weights, Moments())
        assert all(torch.equal(first[name], other[name]) for name in start)  # to the bit


def test_equal_clients_give_what_they_have() -> None:
    start, own = drawn(0), drawn(9)
    for count in (1, 2, 3):
        given = {str(one): own for one in range(count)}
        weights = shares({str(one): one + 1 for one in range(count)})
        found, _ = update(Server(), start, given, weights, Moments())
        for name in start:
            torch.testing.assert_close(found[name], own[name], atol=1e-6, rtol=0)
    one, _ = update(Server(), start, {"a": own}, {"a": 1.0}, Moments())
    assert all(torch.equal(one[name], own[name]) for name in start)  # alone: to the bit


def test_what_a_client_lacks_is_unchanged_there() -> None:
    start = drawn(0)
    name, other = start
    given = {"a": {name: start[name] + 1}, "b": dict(start)}
    found = mean_change(start, given, {"a": 0.25, "b": 0.75})
    np.testing.assert_allclose(found[name].numpy(), 0.25, atol=1e-6)
    assert not found[other].any()


@pytest.mark.parametrize("name", EVERY)
def test_rounds_by_hand(name: str) -> None:
    start = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()}
    deltas = [
        size * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()
        for seed, size in enumerate((1e-3, 0.5, 2e-3, 1e-4), start=1)
    ]
    server, moments, phi, found = Server(aggregation=name), Moments(), start, []
    for delta in deltas:
        given = {"a": {"w": phi["w"] + 2 * delta}, "b": {"w": phi["w"] - delta}}
        phi, moments = update(server, phi, given, {"a": 2 / 3, "b": 1 / 3}, moments)
        found.append(phi["w"].numpy())
    expected = by_hand(name, [delta.numpy() for delta in deltas], start["w"].numpy())
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)
    assert moments.rounds == 4


def test_fedavgm_begins_as_fedavg() -> None:
    start = drawn(0)
    given, weights = clients(start), shares({"a": 1, "b": 2, "c": 3})
    plain, _ = update(Server(), start, given, weights, Moments())
    found, moments = update(Server(aggregation="fedavgm"), start, given, weights, Moments())
    again, _ = update(Server(aggregation="fedavgm"), found, given, weights, moments)
    once_more, _ = update(Server(), found, given, weights, Moments())
    for name in start:
        assert torch.equal(plain[name], found[name])
        assert not torch.allclose(again[name], once_more[name])  # but does not go on so


@pytest.mark.parametrize(
    ("name", "expected"), [("fedadam", 5.0e-4), ("fedyogi", 5.0e-4), ("fedadagrad", 4.1e-4)]
)
def test_first_steps_of_adaptive_servers(name: str, expected: float) -> None:
    change = {"w": torch.full((4,), 1e-3, dtype=torch.float64)}
    steps, _ = step(Server(aggregation=name), change, Moments())
    np.testing.assert_allclose(steps["w"].numpy(), expected, rtol=0.011)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_steps_are_bounded(name: str) -> None:
    """However far a weight has moved at the clients: about eta / sqrt(1 - beta2)."""
    steps, _ = step(Server(aggregation=name), {"w": torch.tensor([1e3]).double()}, Moments())
    assert float(steps["w"]) == pytest.approx(1e-3 / math.sqrt(1 - 0.99), rel=1e-2)


def test_squares_of_the_change_where_asked_for() -> None:
    server = Server(aggregation="fedadam", squared="delta")
    deltas = [2e-3, -1e-3]
    moments, m, v = Moments(), None, 1e-6
    for delta in deltas:
        steps, moments = step(server, {"w": torch.tensor([delta], dtype=torch.float64)}, moments)
        m = delta if m is None else 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2
        assert float(steps["w"]) == pytest.approx(1e-3 * m / (math.sqrt(v) + 1e-3), rel=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_no_change_changes_nothing(name: str) -> None:
    start = drawn(0)
    given = {"a": dict(start), "b": dict(start)}
    found, _ = update(Server(aggregation=name), start, given, {"a": 0.5, "b": 0.5}, Moments())
    assert all(torch.equal(found[key], start[key]) for key in start)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_changed_in_place(name: str) -> None:
    start = drawn(0)
    given, weights = clients(start), shares({"a": 1, "b": 2, "c": 3})
    copies = {key: value.clone() for key, value in start.items()}
    server = Server(aggregation=name)
    found, moments = update(server, start, given, weights, Moments())
    kept = {key: value.clone() for key, value in {**moments.first, **moments.second}.items()}
    update(server, found, given, weights, moments)
    assert all(torch.equal(copies[key], start[key]) for key in start)
    after = {**moments.first, **moments.second}
    assert all(torch.equal(kept[key], after[key]) for key in kept)


def test_products_are_averaged_where_asked_for() -> None:
    start = drawn(0)
    given, weights = clients(start, (1.0, 1.0, 1.0)), shares({"a": 1, "b": 2, "c": 1})
    a, b = start
    change = mean_product(start, given, weights)
    found = {key: start[key].double() + change[key] for key in start}
    product = sum(
        weights[c] * (given[c][b].double() @ given[c][a].double()) for c in given
    ).numpy()  # fmt: skip
    u, s, v = np.linalg.svd(product)
    best = (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose((found[b] @ found[a]).numpy(), best, atol=1e-6)
    plain = mean_change(start, given, weights)
    crossed = (start[b].double() + plain[b]) @ (start[a].double() + plain[a])
    assert np.abs(crossed.numpy() - product).max() > 0.1  # which the factors apart are not
    with pytest.raises(RecipeError, match="moments"):
        Server(aggregation="fedadam", combine="product").check_combine()


def test_a_misfit_is_named() -> None:
    start = drawn(0)
    name = next(iter(start))
    assert misfit(start, {name: start[name]}) is None
    assert "no tensor 'y'" in str(misfit(start, {"y": torch.ones(1)}))
    assert "[3]" in str(misfit(start, {name: torch.ones(3)}))
    assert bytes_of(start) == 4 * (10 + 8)
