"""Scores, the one-class SVM and soft weights of O3, against derivations of their own in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from delible.errors import DataError
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.glocal import Layer, one_class, soft_weight
from delible.routed.tuning import (
    contrast_with_positives,
    contrastive_entropy,
    hidden_tokens,
    pooled,
)


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + 0.5


@pytest.mark.parametrize(("count", "width"), [(5, 12), (40, 6)])
def test_mahalanobis_is_that_of_the_shrunk_covariance(count: int, width: int) -> None:
    own, others, share = features(count, width), features(4, width, 1), 0.3
    mean = own.mean(0)
    spread = (own - mean).T @ (own - mean) / count
    shrunk = (1 - share) * spread + share * np.trace(spread) / width * np.eye(width)
    away = others - mean
    expected = np.einsum("ti,ij,tj->t", away, np.linalg.inv(shrunk), away)
    np.testing.assert_allclose(Layer.of(own, share).mahalanobis(others), expected, rtol=1e-9)


def test_likeness_is_the_largest_cosine() -> None:
    own, others = features(5, 7), features(3, 7, 1)
    expected = [
        max(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in own) for a in others
    ]
    layer = Layer.of(own, 0.1)
    np.testing.assert_allclose(layer.likeness(others), expected, rtol=1e-12)
    np.testing.assert_allclose(layer.likeness(own), 1.0, rtol=1e-12)


def test_scores_partly_cancel_as_published_and_agree_with_one_sign() -> None:
    own, far = features(6, 8), features(1, 8, 3) + 9
    layer, near = Layer.of(own, 0.2), own[:1]
    half, like = 0.5 * layer.mahalanobis(far), layer.likeness(far)
    np.testing.assert_allclose(layer.scores(far, 10.0, -1.0), -half - 10 * like, rtol=1e-12)
    np.testing.assert_allclose(layer.scores(far, 10.0, 1.0), half - 10 * like, rtol=1e-12)
    assert layer.scores(far, 10.0, 1.0)[0] > layer.scores(near, 10.0, 1.0)[0]


@pytest.mark.parametrize("nu", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("count", [3, 15])
def test_one_class_svm_is_the_minimum_of_its_primal(count: int, nu: float) -> None:
    points = features(count, 3, count) + 1.5
    weights, rho = one_class(points, nu)

    def primal(all_: np.ndarray) -> float:
        w, at, slack = all_[:3], all_[3], all_[4:]
        return float(0.5 * w @ w - at + slack.sum() / (nu * count))

    inside = {"type": "ineq", "fun": lambda a: points @ a[:3] - a[3] + a[4:]}
    bounds = [(None, None)] * 4 + [(0, None)] * count
    start = np.concatenate([points.mean(0), [0.0], np.ones(count)])
    found = minimize(
        primal, start, constraints=[inside], bounds=bounds, method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )  # fmt: skip
    slack = np.maximum(rho - points @ weights, 0)
    mine = 0.5 * weights @ weights - rho + slack.sum() / (nu * count)
    assert mine == pytest.approx(found.fun, abs=1e-6)
    np.testing.assert_allclose(weights, found.x[:3], atol=1e-4)
    if nu < 1:
        assert (points @ weights < rho - 1e-6).mean() <= nu + 1e-9


def test_soft_weight_has_its_golden_values() -> None:
    def weight(distance: float, used: float, held: float, spread: float) -> float:
        return float(soft_weight(np.array([distance]), used, held, spread)[0])

    assert weight(0.1, 0.0, 0.2, 1.0) == pytest.approx(0.99966, abs=1e-5)  # sigmoid(8)
    assert weight(1.0, 0.0, 0.2, 1.0) == pytest.approx(0.8463, abs=1e-3)
    assert weight(2.0, 0.0, 0.2, 1.0) == pytest.approx(0.196, abs=1e-3)
    assert weight(1e6, 0.0, 0.2, 1.0) == pytest.approx(1 / (1 + np.exp(2)), abs=1e-9)
    grid = np.linspace(0, 6, 50)
    right, left = (soft_weight(0.1 + sign * grid, 0.0, 0.2, 1.0) for sign in (1, -1))
    np.testing.assert_allclose(right, left, rtol=1e-9)
    assert (np.diff(right) < 0).all()
    narrow = soft_weight(np.array([0.1]), 0.0, 0.2, 1.0, zeta=4.0, offset=1.0)
    assert float(narrow[0]) == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-9)


def test_contrastive_entropy_is_a_sum_over_layers_of_means() -> None:
    mine, known = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    entropy = positives = 0.0
    for layer in range(2):
        for i in range(3):
            dots = [float(mine[layer, i] @ known[layer, j]) for j in range(3)]
            total = sum(np.exp(d) for d in dots)
            shares = [np.exp(d) / total for d in dots]
            entropy -= sum(p * np.log(p) for p in shares) / 3
            positives -= np.log(shares[i]) / 3
    assert float(contrastive_entropy(mine, known)) == pytest.approx(entropy, rel=1e-5)
    assert float(contrast_with_positives(mine, known)) == pytest.approx(positives, rel=1e-5)


def test_padding_is_not_averaged_over() -> None:
    states = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = pooled([states], mask)[0]
    torch.testing.assert_close(found[0], states[0, :2].mean(0))
    torch.testing.assert_close(found[1], states[1].mean(0))


def test_hidden_tokens_are_some_of_those_that_may_be() -> None:
    ids = torch.arange(4 * 400).reshape(4, 400) % 90
    may = torch.ones_like(ids, dtype=torch.bool)
    may[:, 0] = False
    changed, hidden = hidden_tokens(ids, may, 95, 90, torch.Generator().manual_seed(0))
    assert not bool(hidden[:, 0].any())
    assert 0.11 < float(hidden.float().mean()) < 0.19
    assert torch.equal(changed[~hidden], ids[~hidden])
    masked = float((changed[hidden] == 95).float().mean())
    assert 0.7 < masked < 0.9
    one = torch.ones(1, 3, dtype=torch.bool)
    _, few = hidden_tokens(ids[:1, :3], one, 95, 90, torch.Generator().manual_seed(1))
    assert bool(few.any()), "a short text has a hidden token, too"


class Topics:
    """Features by which topic a text is of; the same two layers for all."""

    identity = "topics"

    def __call__(self, texts: list[str], tuned: object = None, scale: float = 1.0) -> np.ndarray:
        found = []
        for text in texts:
            noise = np.random.default_rng(list(text.encode())).normal(size=(2, 6)) * 0.3
            middle = np.ones(6) if text.startswith("a") else np.array([1.0, -1, 1, -1, 1, -1])
            found.append(middle + noise)
        return np.stack(found)


OWN = [f"a question {n}" for n in range(24)]
NEW = [f"a question {n}" for n in range(40, 60)]
OTHER = [f"b question {n}" for n in range(40)]


@pytest.mark.parametrize("changes", [
    {}, {"sign_consistent": False}, {"held_out": "split"}, {"hard": True}, {"nu": 0.5},
])  # fmt: skip
def test_two_topics_are_told_apart(changes: dict[str, object]) -> None:
    options = DetectorOptions(**changes)
    detector = Detector.fit(OWN, Topics(), options, torch.Generator().manual_seed(0))
    _, used, held, *_ = detector.tensors["numbers"].tolist()
    near, far = (
        -np.abs(detector.distances(Topics()(texts)) - (used + held) / 2) for texts in (NEW, OTHER)
    )
    auroc = (near[:, None] > far[None]).mean()
    assert auroc > 0.95
    assert not detector.weights(Topics()(OTHER)).any(), "the gate fires on what is to be kept"
    opened = detector.weights(Topics()(OWN)) > 0
    assert opened.mean() > 0.8
    if not options.hard:
        least = 0.5 if options.held_out == "split" else 0.8
        assert (detector.weights(Topics()(NEW)) > 0).mean() > least


def test_held_out_texts_are_in_no_statistics() -> None:
    def fit(how: str) -> Detector:
        options = DetectorOptions(held_out=how)  # type: ignore[arg-type]
        return Detector.fit(OWN, Topics(), options, torch.Generator().manual_seed(0))

    split, folds = fit("split"), fit("folds")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    used = sorted(set(range(24)) - set(order[::5]))
    own = Topics()([OWN[place] for place in used])
    assert len(split.tensors["features"]) == len(used)
    np.testing.assert_allclose(split.tensors["features"].numpy(), own)
    held = split.distances(Topics()([OWN[place] for place in order[::5]]))
    assert float(split.tensors["numbers"][2]) == pytest.approx(held.mean())
    assert float(split.tensors["numbers"][3]) == pytest.approx(held.std())
    assert len(folds.tensors["features"]) == 24


def test_a_detector_needs_two_questions() -> None:
    with pytest.raises(DataError, match="two different"):
        Detector.fit(["a"] * 3, Topics(), DetectorOptions(), torch.Generator())


def test_a_small_weight_is_none_and_identity_follows_what_counts() -> None:
    make = lambda **o: Detector.fit(  # noqa: E731
        OWN, Topics(), DetectorOptions(**o), torch.Generator().manual_seed(0)
    )
    low = make(floor=0.0).weights(Topics()(OTHER))
    assert low == pytest.approx(np.full(len(OTHER), 0.119))
    assert len({make(**o).identity for o in ({}, {"zeta": 5.0}, {"gamma": 1.0})}) == 3
