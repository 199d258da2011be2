"""A store of entries that are found by words and by meaning together.

    fused(q, k) = w_l minmax(bm25(q, k)) + w_d minmax(cos(e(q), e(k)))     over all k of the store

An entry has a key, by which it is found, and a text, which is what a model gets to see. Entries
belong to a target and to a request, and go when either is deleted: what is left is found as if
they had never been there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from delible.lm.encoder import Encoder
from delible.names import fold
from delible.systems.likeness import Likeness

#: Of Okapi BM25.
SATURATION, LENGTH_WEIGHT = 1.5, 0.75


@dataclass(frozen=True)
class Entry:
    """Something that can be retrieved.

    Attributes:
        key: By which it is found.
        text: What a model gets to see.
        target: Whom or what it is about.
        request: By whose request it is there.
    """

    key: str
    text: str
    target: str
    request: str


@dataclass(frozen=True)
class Found:
    """An entry, and how well it fits a query.

    Attributes:
        lexical: BM25, >= 0.
        cosine: In [-1, 1].
        fused: Both, each min-max normalised over the store, [0, 1].
    """

    entry: Entry
    lexical: float
    cosine: float
    fused: float


class Words:
    """BM25 over an inverted index: a query costs what its words' lists cost."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(fold(text).words()) for text in texts]
        lengths = np.array([sum(one.values()) for one in counts], dtype=np.float64)
        mean = lengths.mean() if len(lengths) and lengths.any() else 1.0
        self._damping = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * lengths / mean)
        lists: dict[str, list[tuple[int, int]]] = {}
        for place, words in enumerate(counts):
            for word, count in words.items():
                lists.setdefault(word, []).append((place, count))
        self._lists = {word: np.array(found) for word, found in lists.items()}
        self._size = len(texts)

    def scores(self, query: str) -> Float[np.ndarray, entry]:
        """BM25 of each text, >= 0; a word of the query counts once."""
        found = np.zeros(self._size)
        for word in set(fold(query).words()) & self._lists.keys():
            places, counts = self._lists[word].T
            rarity = math.log1p((self._size - len(places) + 0.5) / (len(places) + 0.5))
            found[places] += rarity * counts * (SATURATION + 1) / (counts + self._damping[places])
        return found


class Store:
    """Entries, ready to be found.

    Args:
        encoder: Turns keys and queries into vectors.
        entries: What is in it.
        weights: Of words and of meaning.
    """

    def __init__(
        self, encoder: Encoder, entries: Sequence[Entry], weights: tuple[float, float] = (0.5, 0.5)
    ) -> None:
        self.encoder, self.weights, self.entries = encoder, weights, tuple(entries)
        self._words = Words([one.key for one in entries])
        self._meaning = Likeness(encoder, [one.key for one in entries]) if entries else None

    def __len__(self) -> int:
        return len(self.entries)

    def without(self, *, target: str | None = None, request: str | None = None) -> Store:
        """The store without what belongs to a target, or to a request."""
        left = [
            one
            for one in self.entries
            if (target is None or one.target != target)
            and (request is None or one.request != request)
        ]
        return Store(self.encoder, left, self.weights)

    def find(self, queries: Sequence[str], count: int = 1) -> list[list[Found]]:
        """For each query the entries that fit best, the best first."""
        if self._meaning is None or not queries:
            return [[] for _ in queries]
        cosines = self._meaning.cosines(np.asarray(self.encoder.encode(list(queries))))
        found: list[list[Found]] = []
        for query, row in zip(queries, cosines, strict=True):
            lexical = self._words.scores(query)
            fused = self.weights[0] * _spread(lexical) + self.weights[1] * _spread(row)
            best = np.argsort(-fused, kind="stable")[:count]
            found.append([
                Found(self.entries[i], float(lexical[i]), float(row[i]), float(fused[i]))
                for i in map(int, best)
            ])  # fmt: skip
        return found


def _spread(values: Float[np.ndarray, entry]) -> Float[np.ndarray, entry]:
    """Values from 0 to 1; all 0 if they are equal."""
    low, high = float(values.min()), float(values.max())
    spread: Any = (values - low) / (high - low) if high > low else np.zeros(len(values))
    return np.asarray(spread, dtype=np.float64)


__all__ = ["Entry", "Found", "Store", "Words"]
