"""An encoder without a model, to try agents out by rule: texts that share words are near.

Each word has a direction of its own, drawn from its hash; a text is the sum of its words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

WIDTH = 48


@cache
def direction(word: str) -> Float[np.ndarray, hidden]:
    """The same for a word at any time and on any machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


class WordVectors:
    """Sums of the directions of a text's words, whatever their case and order."""

    identity = "words"

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text hidden"]:
        found = np.zeros((len(texts), WIDTH), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                found[row] += direction(word)
        return found


__all__ = ["WIDTH", "WordVectors", "direction"]
