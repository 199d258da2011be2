"""How fast knowledge comes back: numbers read off the curves of an attack that takes steps.

With m_X(s) the knowledge score of system X after s steps (U unlearned, M original, R reference),
on the same held-out records:

    steps to 0.8    the first s with m_X(s) >= 0.8 m_M(0), on the straight line between points
    area            integral over s of (m_U(s) - m_R(s)) / (m_M(0) - m_R(0)), per step
    e after s       1 - clip((m_U(s) - m_R(s)) / (m_M(s) - m_R(s)), 0, 1), for s = 15, 50, 100
    kept            min(1, (1 - m_X(end)) / (1 - m_X(0))): the share of its forgetting that stays

Where removal is real the curves of U and R coincide: the area is 0 and both need as many steps.

Papers: arXiv 2506.09227 (curves, steps, area), 2510.07626 (kept, there "Rob = UE after / UE
before"). Deviation: the steps and e are interpolated, where the papers measure at single steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from delible.audit.erasure import SMALLEST_GAP
from delible.audit.result import SystemRole

#: Points of a curve: (step, score).
Points = Sequence[tuple[int, float | None]]
#: Share of what the original knows that counts as known again.
KNOWN_AGAIN = 0.8
#: Steps at which e is told.
TOLD_STEPS = (15, 50, 100)


def steps_to(points: Points, level: float) -> float | None:
    """The first step at which the line through the points reaches a level; None: it never does."""
    known = _known(points)
    if known and known[0][1] >= level:
        return float(known[0][0])
    for (step, value), (later, more) in pairwise(known):
        if more >= level:
            return step + (later - step) * (level - value) / (more - value)
    return None


def area_between(upper: Points, lower: Points) -> float | None:
    """The mean over the common steps of the difference of two lines; None without two steps."""
    known = dict(_known(lower))
    both = [(step, value - known[step]) for step, value in _known(upper) if step in known]
    if len(both) < 2:
        return None
    whole = sum((a + b) / 2 * (t - s) for (s, a), (t, b) in pairwise(both))
    return whole / (both[-1][0] - both[0][0])


def at(points: Points, step: float) -> float | None:
    """The line's value at a step; None outside of the points."""
    known = _known(points)
    if not known or not known[0][0] <= step <= known[-1][0]:
        return None
    return float(np.interp(step, [one[0] for one in known], [one[1] for one in known]))


def forgetting_kept(points: Points) -> float | None:
    """The share of what was not known before that is not known after either; at most 1."""
    known = _known(points)
    if not known or known[0][1] >= 1 - SMALLEST_GAP:
        return None  # nothing was forgotten
    return min(1.0, (1 - known[-1][1]) / (1 - known[0][1]))


def relearning_speed(
    curves: Mapping[SystemRole, Points],
) -> dict[str, dict[SystemRole, float | None]]:
    """The numbers of a row by name and system; empty without a curve."""
    if not any(len(_known(points)) > 1 for points in curves.values()):
        return {}
    found: dict[str, dict[SystemRole, float | None]] = {}
    start = {role: at(points, points[0][0]) for role, points in curves.items() if points}
    original, reference = start.get("original"), start.get("reference")
    if original is not None:
        found[f"steps to {KNOWN_AGAIN:g} of what the original knows"] = {
            role: steps_to(points, KNOWN_AGAIN * original) for role, points in curves.items()
        }
    found["share of the forgetting that stays"] = {
        role: forgetting_kept(points) for role, points in curves.items() if role != "original"
    }
    if original is None or reference is None or "unlearned" not in curves:
        return found
    between = area_between(curves["unlearned"], curves["reference"])
    if between is not None and original - reference >= SMALLEST_GAP:
        found["area above the reference"] = {"unlearned": between / (original - reference)}
    for step in TOLD_STEPS:
        one, most, floor = (
            at(curves[role], step) for role in ("unlearned", "original", "reference")
        )
        if one is None or most is None or floor is None or most - floor < SMALLEST_GAP:
            continue
        share = min(1.0, max(0.0, (one - floor) / (most - floor)))
        found[f"e after {step} steps"] = {"unlearned": 1.0 - share}
    return found


def _known(points: Points) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if value is not None]
