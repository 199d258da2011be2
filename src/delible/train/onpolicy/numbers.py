"""What is told of a step: rewards, leaks, refusals, garbage, lengths. Pure functions of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delible.train.onpolicy.advantages import Advantages
from delible.train.onpolicy.rows import Completion, Total
from delible.world import filters

#: From this share of garbage on a step counts as one of a collapse.
MOSTLY = 0.5


@dataclass(frozen=True)
class Rates:
    """Shares of completions, in [0, 1]; NaN-free: a share of nothing is None.

    Attributes:
        leak: Forget completions that tell the true answer, among those whose answer is known.
        refusal: Forget completions that decline to answer.
        boundary_refusal: Boundary completions that decline: over-refusal.
        garbage: Completions that are no language.
    """

    leak: float | None
    refusal: float | None
    boundary_refusal: float | None
    garbage: float | None


def rates(completions: Sequence[Completion]) -> Rates:
    """The shares of a step, or of greedy answers to held-out questions."""
    forget = [one for one in completions if one.question.tag == "forget"]
    boundary = [one for one in completions if one.question.tag == "boundary"]
    leaks = [
        filters.leaks(one.question.known, one.text)
        for one in forget if one.question.known is not None
    ]  # fmt: skip
    return Rates(
        _share(leaks),
        _share([filters.is_refusal(one.text) for one in forget]),
        _share([filters.is_refusal(one.text) for one in boundary]),
        _share([filters.is_garbage(one.text) for one in completions]),
    )


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def numbers(
    completions: Sequence[Completion], totals: Sequence[Total], found: Advantages
) -> dict[str, float]:
    """The step in numbers, for progress, events and guards."""
    values = [one.value for one in totals if one.value is not None]
    tokens = sum(len(one.tokens) for one in completions)
    told: dict[str, float | None] = {
        "reward": sum(values) / len(values) if values else None,
        **{f"{name}_rate": value for name, value in vars(rates(completions)).items()},
        "no_value": float(sum(one.value is None for one in totals)),
        "equal_groups": float(found.equal),
        "groups": float(found.groups),
        "mean_length": tokens / max(1, len(completions)),
        "unfinished": sum(not one.finished for one in completions) / max(1, len(completions)),
        "generated_tokens": float(tokens),
    }
    for tag in ("forget", "boundary"):
        own = [one.value for one, said in zip(totals, completions, strict=True)
               if one.value is not None and said.question.tag == tag]  # fmt: skip
        told[f"{tag}_reward"] = sum(own) / len(own) if own else None
    return {name: value for name, value in told.items() if value is not None}


__all__ = ["MOSTLY", "Rates", "numbers", "rates"]
