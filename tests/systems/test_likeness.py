"""Likeness to many texts: exact, found in few of their bits, and kept over a reload."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from delible.systems import likeness as likeness_file
from delible.systems.likeness import Likeness
from delible.systems.sketch import MISS, STAGES, Sketch, radius

HIDDEN = 48


class Table:
    """Vectors by text: those that were given, and random ones that depend on the text."""

    def __init__(self, identity: str, given: dict[str, npt.NDArray[np.float32]]) -> None:
        self.identity, self.given = identity, given
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.encoded += texts
        found = np.zeros((len(texts), HIDDEN), dtype=np.float32)
        for row, text in enumerate(texts):
            found[row] = self.given.get(text, np.eye(HIDDEN, dtype=np.float32)[0])
        return found


def at_cosine(
    vector: npt.NDArray[np.float64], cosine: float, draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Another unit vector at this cosine."""
    other = draw.standard_normal(len(vector))
    other -= (other @ vector) * vector
    other /= np.linalg.norm(other)
    return cosine * vector + math.sqrt(1 - cosine**2) * other


def units(count: int, seed: int = 0) -> npt.NDArray[np.float64]:
    found = np.random.default_rng(seed).standard_normal((count, HIDDEN))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(("bits", "cosine"), [(128, 0.75), (384, 0.75), (128, 0.3), (384, 0.99)])
def test_the_radius_is_the_least_that_a_binomial_exceeds_so_rarely(
    bits: int, cosine: float
) -> None:
    angle = math.acos(cosine) / math.pi

    def beyond(limit: int) -> float:
        return math.fsum(
            math.comb(bits, k) * angle**k * (1 - angle) ** (bits - k)
            for k in range(limit + 1, bits + 1)
        )

    found = radius(bits, cosine, 1e-3)
    assert beyond(found) <= 1e-3 < beyond(found - 1)
    assert radius(bits, cosine, MISS) > found


def test_bits_differ_as_often_as_the_angle_says() -> None:
    draw = np.random.default_rng(3)
    one = units(1)[0]
    others = np.stack([at_cosine(one, 0.6, draw) for _ in range(300)])
    counted = []
    for seed in range(20):
        sketch = Sketch(others.astype(np.float32), seed)
        for stage in range(len(STAGES)):
            own = sketch._of(one[None].astype(np.float32), stage)[0]
            apart = np.bitwise_count(sketch._bits[stage] ^ own[:, None]).sum(axis=0)
            counted.append(apart / STAGES[stage])
    assert np.concatenate(counted).mean() == pytest.approx(math.acos(0.6) / math.pi, abs=0.01)


def test_what_is_near_enough_is_kept_and_most_of_the_rest_is_not() -> None:
    draw = np.random.default_rng(1)
    one = units(1)[0]
    near = np.stack([at_cosine(one, cosine, draw) for cosine in np.linspace(0.75, 0.999, 500)])
    rows = np.concatenate([units(9000, seed=5), near]).astype(np.float32)
    kept = Sketch(rows, 0).near(one.astype(np.float32), 0.75)
    assert set(range(9000, 9500)) <= set(kept.tolist())
    assert len(kept) < 500 + 0.05 * 9000


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.9, -0.5])
def test_many_texts_are_compared_as_few_are(threshold: float) -> None:
    draw = np.random.default_rng(2)
    rows = units(6000, seed=7)
    asked = np.stack(
        [
            *(at_cosine(rows[37 * k], threshold + 0.001 * (-1) ** k, draw) for k in range(40)),
            *units(40, seed=8),
        ]
    ).astype(np.float32)
    texts = [f"text {place}" for place in range(len(rows))]
    given = dict(zip(texts, rows.astype(np.float32), strict=True))
    index = Likeness(Table("a", given), texts)
    wanted = (asked.astype(np.float64) @ rows.T).max(axis=1) >= threshold
    assert index.reach(asked, threshold).tolist() == wanted.tolist()
    if threshold > 0:
        assert wanted[:40].any()
        assert not wanted.all()


def test_few_texts_are_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("bits of few texts")

    monkeypatch.setattr(likeness_file, "Sketch", fail)
    index = Likeness(Table("b", {}), ["one", "two"])
    index.prepare()
    assert index.reached(["some text"], 0.9)
    assert not index.reached(["  ..."], -1.0), "there is nothing to judge"


def test_a_sentence_in_a_text_is_enough() -> None:
    one, other = np.eye(HIDDEN, dtype=np.float32)[:2]
    encoder = Table("c", {"asked": one, "Well. asked. Then": other, "Well": other, "Then": other})
    index = Likeness(encoder, ["asked"])
    assert index.reached(["Well. asked. Then"], 0.99)
    assert not index.reached(["Well", "Then"], 0.99)


def test_a_text_that_an_index_in_use_holds_is_not_encoded_again() -> None:
    gc.collect()
    vectors = units(3, seed=9).astype(np.float32)
    encoder = Table("d", dict(zip(["x", "y", "z"], vectors, strict=True)))
    before = Likeness(encoder, ["x", "y"])
    after = Likeness(encoder, ["z", "y", "y"])
    assert encoder.encoded == ["x", "y", "z"]
    assert np.allclose(after.vectors, vectors[[2, 1, 1]])
    another = Table("another encoder", {})
    Likeness(another, ["x"])
    assert another.encoded == ["x"], "vectors of another encoder mean nothing"
    del before, after
    gc.collect()
    Likeness(encoder, ["x"])
    assert encoder.encoded == ["x", "y", "z", "x"], "what nobody goes by is not kept"
