"""FIT's score of a set of records and its closeness to a target. No metric lives here.

    score = 100 (Prob x ROUGE x Acc)^(1/3)
    target(n) = start + (reference - start) n / N,    closeness = max(0, 1 - |score / target - 1|)

Paper: FIT (arXiv 2601.21682); reference code: XiaoyuXU1/FIT.
"""

from __future__ import annotations

from delible.errors import RecipeError
from delible.measure.metric import SystemValues

#: The parts of a score: the metrics behind Prob, ROUGE and Acc.
PARTS = ("answer_probability", "rouge_l_f1", "exact_memorisation")


def combined_score(probability: float, rouge: float, accuracy: float) -> float:
    """Geometric mean of three numbers in [0, 1], times 100."""
    return 100 * float(probability * rouge * accuracy) ** (1 / 3)


def target_score(reference: float, start: float | None, progress: float) -> float:
    """What the score should be after a share of the requests.

    Args:
        reference: Score of the reference, which never saw what is deleted; reached at the end.
        start: Score of the model before the first request.
        progress: Requests done, as a share of all, in (0, 1].

    Raises:
        RecipeError: Not all requests are done, and the start is not known.
    """
    if progress == 1:
        return reference
    if start is None:
        raise RecipeError(
            f"after {progress:.0%} of the requests the target lies between start and reference, "
            "but the start is not known.",
            where="option 'start_score'",
            hint="Give the score of the model before the first request (start_score: 0 to 100).",
        )
    return start + (reference - start) * progress


def closeness(score: float, target: float) -> float | None:
    """1 at the target, falling on both sides; ``None`` when the target is 0."""
    return None if target == 0 else max(0.0, 1 - abs(score / target - 1))


def split_score(
    values: SystemValues, split: str, accuracy_split: str | None = None
) -> float | None:
    """Score of a split; ``None`` when a part was not measured.

    Args:
        values: Of a system.
        split: Whose records.
        accuracy_split: Another split for the accuracy, see ``compat`` of the metrics.
    """
    splits = (split, split, accuracy_split or split)
    parts = [values.means.get(name, {}).get(one) for name, one in zip(PARTS, splits, strict=True)]
    found = [part for part in parts if part is not None]
    return combined_score(*found) if len(found) == len(PARTS) else None


def judged(
    values: SystemValues,
    reference: SystemValues | None,
    split: str,
    accuracy_split: str | None,
    progress: float,
    start: float | None,
) -> tuple[float | None, float | None, float | None]:
    """Closeness, score and target of a split; ``None`` for what needs a missing reference.

    Raises:
        RecipeError: ``progress`` is below 1 and there is no ``start``.
    """
    score = split_score(values, split, accuracy_split)
    theirs = None if reference is None else split_score(reference, split, accuracy_split)
    target = None if theirs is None else target_score(theirs, start, progress)
    near = None if score is None or target is None else closeness(score, target)
    return near, score, target
