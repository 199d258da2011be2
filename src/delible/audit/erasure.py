"""How much is erased: the score e, its interval, and which facts and subjects were left alone.

    e = 1 - clip((m(aU) - m(aR)) / (m(aM) - m(aR)), 0, 1)

for a knowledge score m (larger = more is known) of the unlearned system U, the original M and the
retrain reference R, all three under the same attack a and on the same records. e = 0: all that
the original knows is there; e = 1: no more than in a model that never saw it. So U = M gives 0
and U = R gives 1 whatever the attack does to a model. Without a reference the floor m(aR) is what
the original scores, under the same attack, on records that it never saw.

Where the attack leaves no gap between original and floor it has no power: it could not have told
the two apart, so there is no e, and nothing follows from it.

Source: arXiv 2506.09227. Deviation: its formula leaves M unattacked, which contradicts its own
check (U = M gives 0 for every attack).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binom

from delible.audit.resampling import (
    FEWEST_RECORDS,
    Array,
    percentiles,
    resampled_means,
    widened,
)

#: Least lead of the original over the floor, and least share of its lead without the attack.
SMALLEST_GAP, SMALLEST_SHARE = 0.05, 0.25
#: Least lead on a single record for it to be looked at alone.
RECORD_GAP = 0.2
#: A record is untouched when at least this share of the lead is still there.
UNTOUCHED = 0.8
#: Forget answers this much less likely than the floor are over-forgotten.
OVER_FORGOTTEN = 0.25


@dataclass(frozen=True)
class Known:
    """Knowledge scores of one measure under one attack, one per record.

    Attributes:
        unlearned: Shape [records].
        original: The same records.
        floor: The reference on the same records, or the original on records it never saw.
        paired: The floor is on the same records.
        groups: Records of one fact have the same number.
    """

    unlearned: Float[np.ndarray, " record"]
    original: Float[np.ndarray, " record"]
    floor: Float[np.ndarray, " floor"]
    paired: bool = True
    groups: tuple[int, ...] | None = None

    @property
    def gap(self) -> float:
        """The original's lead over the floor."""
        return float(self.original.mean() - self.floor.mean())

    @property
    def facts(self) -> int:
        """How many different facts the records are of."""
        return len(self.unlearned) if self.groups is None else len(set(self.groups))

    def floors(self) -> Array:
        """The floor of each record."""
        return self.floor if self.paired else np.full(len(self.unlearned), self.floor.mean())


@dataclass(frozen=True)
class Erasure:
    """e with its interval, or why there is none.

    Attributes:
        value: In [0, 1]; None where it cannot be said.
        low: Lower end of the 95 % interval; None with too few records.
        reason: Why there is no value.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def erasure(known: Known, *, plain_gap: float | None = None, seed: int = 0) -> Erasure:
    """The erasure score of one measure under one attack.

    Args:
        known: The scores.
        plain_gap: The original's lead on the same records without the attack; None: not known,
            or this is no attack.
        seed: Of the interval.
    """
    if not len(known.unlearned) or not len(known.floor):
        return Erasure(None, reason="no record has a value for all systems")
    gap = known.gap
    floor = "reference" if known.paired else "original on records it never saw"
    if gap < SMALLEST_GAP:
        return Erasure(
            None,
            reason=f"no power: here the original knows hardly more than the {floor} "
            f"({known.original.mean():.2f} against {known.floor.mean():.2f})",
        )
    if plain_gap is not None and gap < SMALLEST_SHARE * plain_gap:
        return Erasure(
            None,
            reason="no power: the attack takes the original's own knowledge away "
            f"(its lead falls from {plain_gap:.2f} to {gap:.2f})",
        )
    draws = _drawn(known, seed)
    if draws is not None and percentiles(draws[:, 1] - draws[:, 2])[0] <= 0:
        return Erasure(
            None,
            reason=f"no power: that the original knows more than the {floor} could be chance on "
            f"{len(known.unlearned)} records",
        )
    value = _clipped((known.unlearned.mean() - known.floor.mean()) / gap)
    if draws is None:
        return Erasure(value)
    gaps = np.maximum(draws[:, 1] - draws[:, 2], SMALLEST_GAP)
    interval = percentiles(1 - np.clip((draws[:, 0] - draws[:, 2]) / gaps, 0, 1))
    seen = np.concatenate([known.unlearned, known.original])[None]
    return Erasure(value, *widened(value, interval, known.facts, seen))


def _clipped(share: float) -> float:
    return 1.0 - min(1.0, max(0.0, float(share)))


def _drawn(known: Known, seed: int) -> Float[np.ndarray, "resample three"] | None:
    """Resampled means of unlearned, original and floor; None with too few facts or records."""
    if known.facts < FEWEST_RECORDS:
        return None
    if known.paired:
        columns = np.stack([known.unlearned, known.original, known.floor])
        return resampled_means(columns, known.groups, seed)
    if len(known.floor) < FEWEST_RECORDS:
        return None
    columns = np.stack([known.unlearned, known.original])
    floors = resampled_means(known.floor[None], None, seed + 1)
    return np.concatenate([resampled_means(columns, known.groups, seed), floors], axis=1)


@dataclass(frozen=True)
class Untouched:
    """Facts that were left as they were.

    Attributes:
        count: Records where the unlearned system has nearly all of the original's lead.
        comparable: Records where the original has a clear lead.
        guessed: Share of records that a model which never saw them knows as well, by luck.
        chance: Probability of as many by such luck alone.
        where: Indices of the untouched records.
    """

    count: int
    comparable: int
    guessed: float
    chance: float
    where: tuple[int, ...] = ()


def untouched(known: Known, among: Sequence[int] | None = None) -> Untouched:
    """The records that were left alone: a mean over all hides them.

    Args:
        known: The scores.
        among: Indices of records to look at; None: all. How often luck helps is taken from all.
    """
    floors = known.floors()
    leads = known.original - floors
    kept = (known.unlearned - floors) >= UNTOUCHED * leads
    clear = leads >= RECORD_GAP
    # Where the original itself knows nothing, nobody can be lucky.
    has = known.original >= RECORD_GAP
    if known.paired:
        lucky = (known.floor >= UNTOUCHED * known.original)[has]
    else:
        lucky = known.floor >= UNTOUCHED * (known.original[has].mean() if has.any() else np.inf)
    # Jeffreys' prior: no luck among a few records does not mean that there is none.
    guessed = float((lucky.sum() + 0.5) / (len(lucky) + 1))
    chosen = np.ones(len(leads), bool) if among is None else np.isin(range(len(leads)), among)
    where = np.flatnonzero(kept & clear & chosen)
    comparable = int((clear & chosen).sum())
    chance = float(binom.sf(len(where) - 1, comparable, guessed)) if comparable else 1.0
    return Untouched(len(where), comparable, guessed, chance, tuple(map(int, where)))


def share_erased(known: Known, among: Sequence[int]) -> float | None:
    """e of a few records (a subject's), without interval; None without a lead there."""
    rows = list(among)
    floors = known.floors()
    lead = float((known.original - floors)[rows].mean()) if rows else 0.0
    if lead < SMALLEST_GAP:
        return None
    return _clipped(float((known.unlearned - floors)[rows].mean()) / lead)


def over_forgotten(
    unlearned: Float[np.ndarray, " record"], floor: Float[np.ndarray, " floor"], seed: int = 0
) -> float | None:
    """How likely the answers are, as a share of the floor; None where they are not far below.

    Args:
        unlearned: Probabilities of the forget answers in the unlearned system.
        floor: The reference's on the same records, or the original's on records it never saw.
    """
    if not len(unlearned) or not len(floor) or floor.mean() <= 0:
        return None
    ratio = float(unlearned.mean() / floor.mean())
    if ratio >= OVER_FORGOTTEN:
        return None
    if min(len(unlearned), len(floor)) >= FEWEST_RECORDS:
        drawn = resampled_means(unlearned[None], None, seed)[:, 0]
        others = resampled_means(floor[None], None, seed + 1)[:, 0]
        if percentiles(drawn / np.maximum(others, 1e-12))[1] >= 2 * OVER_FORGOTTEN:
            return None
    return ratio
