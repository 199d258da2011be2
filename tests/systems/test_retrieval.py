"""A store of entries: BM25 and cosines together, and entries that go without a trace."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from delible.systems.retrieval import Entry, Store, Words

TEXTS = (
    "the lighthouse keeper wrote three novels",
    "the mill at Casta grinds flour, flour and flour",
    "three novels about a lighthouse",
    "",
)


class Letters:
    """Counts of letters: cosines that anybody can work out."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(texts), 26), dtype=np.float32)
        for row, text in enumerate(texts):
            for letter in re.findall("[a-z]", text.lower()):
                found[row, ord(letter) - 97] += 1
        return found


def bm25(query: str, text: str, texts: Sequence[str]) -> float:
    """Okapi BM25 word by word, k1 = 1.5, b = 0.75."""
    split = [re.findall(r"\w+", one.lower()) for one in texts]
    mean = sum(map(len, split)) / len(split)
    words = re.findall(r"\w+", text.lower())
    total = 0.0
    for word in set(re.findall(r"\w+", query.lower())):
        holding = sum(word in one for one in split)
        rarity = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        count = words.count(word)
        total += rarity * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(words) / mean))
    return total


def cosine(query: str, text: str) -> float:
    one, other = Letters().encode([query, text]).astype(np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms else 0.0


QUERIES = ("Who wrote novels in the lighthouse?", "flour", "flour flour", "zebra", "THREE Novels!")


@pytest.mark.parametrize("query", QUERIES)
def test_bm25_is_that_of_the_formula(query: str) -> None:
    expected = [bm25(query, text, TEXTS) for text in TEXTS]
    assert Words(TEXTS).scores(query) == pytest.approx(expected)


def entries() -> list[Entry]:
    return [Entry(text, f"k{n}", f"t{n % 2}", f"r{n // 2}") for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("size", [3, 4])  # of the first three no score need be 0
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.2, 0.8)])
def test_both_are_spread_over_the_store_and_weighed(
    weights: tuple[float, float], size: int
) -> None:
    texts = TEXTS[:size]
    store = Store(Letters(), entries()[:size], weights)
    for query in QUERIES:
        words = np.array([bm25(query, text, texts) for text in texts])
        meaning = np.array([cosine(query, text) for text in texts])
        spread = [
            (one - one.min()) / (one.max() - one.min()) if one.max() > one.min() else one * 0
            for one in (words, meaning)
        ]
        fused = weights[0] * spread[0] + weights[1] * spread[1]
        found = store.find([query], 4)[0]
        order = [int(one.entry.text[1]) for one in found]
        assert [one.fused for one in found] == pytest.approx(sorted(fused, reverse=True), abs=1e-5)
        assert [one.lexical for one in found] == pytest.approx(words[order], abs=1e-5)
        assert [one.cosine for one in found] == pytest.approx(meaning[order], abs=1e-5)
        assert [one.fused for one in found] == pytest.approx(fused[order], abs=1e-5)


def test_what_is_deleted_is_found_no_more_and_counts_no_more() -> None:
    store = Store(Letters(), entries())
    left = store.without(request="r0")
    assert [one.text for one in left.entries] == ["k2", "k3"]
    fresh = Store(Letters(), entries()[2:])
    assert left.find(QUERIES, 4) == fresh.find(QUERIES, 4)
    assert [one.text for one in store.without(target="t1").entries] == ["k0", "k2"]
    empty = left.without(request="r1")
    assert len(empty) == 0
    assert empty.find(["flour"]) == [[]]
    assert len(store) == 4
