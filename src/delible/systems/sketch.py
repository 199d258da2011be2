"""A few bits of each vector, by which most of an index need not be looked at.

    bit_b(v) = [h_b . v >= 0]              h_b: random directions, drawn from a normal distribution
    P(bit_b(v) != bit_b(u)) = angle(v, u) / pi
    kept(v)  = { u : differing bits of v and u <= r },   P(Binomial(bits, acos(t) / pi) > r) <= MISS

So whatever has at least the cosine t is among what is kept, but for a share of MISS at most. That
holds for every pair of vectors, whatever the data (Charikar 2002, similarity estimation from
rounding). What is kept is then compared exactly. A few bits of all rows are looked at first, and
more bits of the rows that are left.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float

#: Of what has the cosine that is looked for, the share that may be overlooked.
MISS = 1e-6
#: Bits of each row: those looked at first, and those looked at then.
STAGES = (128, 384)
#: Rows that are turned into bits at a time.
BLOCK = 8192


@lru_cache(maxsize=64)
def radius(bits: int, cosine: float, miss: float) -> int:
    """So many bits differ at most, but for a share ``miss`` of pairs with at least this cosine."""
    from scipy.stats import binom

    angle = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return int(binom.ppf(1.0 - miss, bits, angle))


class Sketch:
    """Bits of the rows of a matrix.

    Args:
        vectors: The rows; only their directions matter.
        seed: Draws the directions.
    """

    def __init__(self, vectors: Float[np.ndarray, "index hidden"], seed: int) -> None:
        draw = np.random.default_rng(seed)
        self._directions = [
            draw.standard_normal((vectors.shape[1], bits), dtype=np.float32) for bits in STAGES
        ]
        #: By stage: 64 bits of all rows, then the next 64.
        self._bits = [np.empty((bits // 64, len(vectors)), dtype=np.uint64) for bits in STAGES]
        for start in range(0, len(vectors), BLOCK):
            part = vectors[start : start + BLOCK]
            for stage, bits in enumerate(self._bits):
                bits[:, start : start + BLOCK] = self._of(part, stage).T

    def near(self, vector: Float[np.ndarray, hidden], cosine: float) -> np.ndarray:
        """The rows that may have at least this cosine to a vector, in order."""
        rows: np.ndarray | None = None
        for stage, bits in enumerate(self._bits):
            own = self._of(vector[None], stage)[0]
            apart = np.zeros(bits.shape[1] if rows is None else len(rows), dtype=np.uint16)
            for word, of_all in zip(own, bits, strict=True):
                apart += np.bitwise_count((of_all if rows is None else of_all[rows]) ^ word)
            kept = np.flatnonzero(apart <= radius(STAGES[stage], cosine, MISS / len(STAGES)))
            rows = kept if rows is None else rows[kept]
        assert rows is not None
        return rows

    def _of(self, vectors: Float[np.ndarray, "text hidden"], stage: int) -> np.ndarray:
        signs = vectors @ self._directions[stage] >= 0
        return np.packbits(signs, axis=1).view(np.uint64)


__all__ = ["MISS", "STAGES", "Sketch", "radius"]
