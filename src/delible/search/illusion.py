"""Which surrogates count, and how far a number tells another story of them than of forget texts.

    scaled(m) = (m - m(original)) / (m(reference) - m(original)),   cut to [0, 1]; 1 = forgotten
    gap       = scaled(m; forget texts) - scaled(m; surrogates)
    illusion  if scaled(m; forget texts) >= 0.8 and gap >= 0.2

Paper: arXiv 2512.19025 (the limits are ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from delible.names import fold
from delible.search.surrogate import RUN, Scored

#: A number says "forgotten" from here on, and tells a false story if the gap is as large as that.
FORGOTTEN, FALSE = 0.8, 0.2


@dataclass(frozen=True)
class Limits:
    """What a surrogate must keep to.

    Attributes:
        distance: From the nearest forget text, at least.
        gain: Nats by token, at least.
        loss: Nats by token of the original, at most.
    """

    distance: float
    gain: float
    loss: float


def limits(unrelated: Scored, most_loss: float) -> Limits:
    """Limits from texts of the same kind that have nothing to do with the forget texts.

    The distance that 95 % of them exceed, and the gain that 95 % of them stay below.
    """
    return Limits(
        float(np.quantile(unrelated.least_distance, 0.05)),
        float(np.quantile(unrelated.gain, 0.95)),
        most_loss,
    )


def reasons(
    texts: Sequence[str], scored: Scored, forget: Sequence[str], limit: Limits
) -> list[str]:
    """Why each text is no surrogate: the first limit that it breaks; empty for one that is."""
    known = set[tuple[str, ...]]().union(*(_runs(text) for text in forget))
    seen = set[tuple[str, ...]]()
    found = []
    for place, text in enumerate(texts):
        words = tuple(fold(text).words())
        broken = {
            "no words": not words,
            "near": not scored.least_distance[place] >= limit.distance,
            "not told": not scored.gain[place] > limit.gain,
            "unlikely": not scored.loss[place] <= limit.loss,
            "copied": bool(_runs(text) & known),
            "given before": words in seen,
        }
        found.append(next((reason for reason, holds in broken.items() if holds), ""))
        if not found[-1]:
            seen.add(words)
    return found


def accepted(
    texts: Sequence[str], scored: Scored, forget: Sequence[str], limit: Limits
) -> Bool[np.ndarray, " text"]:
    """Which texts are far, told, fluent, no copies of forget texts, and given once."""
    return np.array([not reason for reason in reasons(texts, scored, forget, limit)], bool)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = fold(text).words()
    return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


def share(value: float, original: float, reference: float, least: float = 1e-9) -> float | None:
    """The way from the original's value to the reference's that a value has gone, not cut.

    Args:
        least: None where the two ends are nearer to each other than that: a number that cannot
            tell them apart says nothing of what is between.
    """
    if abs(reference - original) < least:
        return None
    return (value - original) / (reference - original)


def scaled(value: float, original: float, reference: float, least: float = 1e-9) -> float | None:
    """How much is forgotten by a number, :func:`share` cut to [0, 1]; 1 = forgotten."""
    gone = share(value, original, reference, least)
    return None if gone is None else min(1.0, max(0.0, gone))


@dataclass(frozen=True)
class Story:
    """What one number says of the forget texts and of the surrogates.

    Attributes:
        forget: Share forgotten, in [0, 1], read on the forget texts.
        surrogate: The same, read on the surrogates.
    """

    forget: float | None
    surrogate: float | None

    @property
    def gap(self) -> float | None:
        """Above 0: it says of the forget texts that more was forgotten."""
        if self.forget is None or self.surrogate is None:
            return None
        return self.forget - self.surrogate

    @property
    def false(self) -> bool:
        """Whether it says "forgotten" of what is still known in other words."""
        gap = self.gap
        return gap is not None and (self.forget or 0.0) >= FORGOTTEN and gap >= FALSE
