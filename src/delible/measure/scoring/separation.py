"""How well one number tells two groups apart. No metric lives here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def area_under_curve(low: Sequence[float], high: Sequence[float]) -> float | None:
    """Probability that a value of the second group is above one of the first; ties count half.

    This is the area under the receiver operating characteristic.

    Args:
        low: Values of the group that should have the lower ones, shape [n].
        high: Values of the group that should have the higher ones, shape [m].

    Returns:
        A value in [0, 1]: 1 = all told apart, 0.5 = alike. ``None`` if a group is empty.
    """
    if not low or not high:
        return None
    ranks = rankdata(np.asarray([*low, *high], np.float64))
    above = float(ranks[len(low) :].sum()) - len(high) * (len(high) + 1) / 2
    return above / (len(low) * len(high))


def privacy_leak(curve: float, reference: float) -> float | None:
    """MUSE's PrivLeak, in percent, from two areas (1 = members are told).

    Returns:
        About -100 for a model that has memorised the members, 0 for one that is like the
        reference, above 0 where members look *less* seen than unseen texts. ``None`` where the
        reference tells every member, so that there is nothing to divide by.
    """
    ours, theirs = 1 - curve, 1 - reference
    return None if theirs <= 0 else 100 * (ours - theirs) / theirs
