"""The attack that a determined person would take: the cheapest of those that get most.

What an attack costs is counted and not timed: steps of training or search first, which need the
weights, then questions. What an audit knew already takes no time, and would look cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

from delible.audit.result import Leak
from delible.audit.weighing import SAME, Finding, worst

#: What brings back less than this has brought back nothing worth a name.
WORTH = 0.2


def cheapest(attacks: Sequence[Leak]) -> tuple[Leak, Finding] | None:
    """The attack and what it found; None where no attack has power.

    Of the attacks whose lowest e is within 0.05 of the lowest of all, the one that takes fewest
    steps, then fewest questions.
    """
    found = [
        (leak, finding) for leak in attacks if leak.weighs and (finding := worst(leak)) is not None
    ]
    if not found:
        return None
    lowest = min(finding.erased for _, finding in found)
    close = [pair for pair in found if pair[1].erased <= lowest + SAME]
    return min(close, key=lambda pair: (*cost(pair[0]), pair[1].erased))


def cost(leak: Leak) -> tuple[int, int]:
    """What is compared: steps, then questions."""
    return leak.cost_steps, leak.cost_queries


def cost_words(leak: Leak) -> str:
    """What an attack takes of the unlearned system, in words."""
    parts = [f"{leak.cost_steps:,} steps"] if leak.cost_steps else []
    if leak.cost_queries:
        parts.append(f"{leak.cost_queries:,} questions")
    return ", ".join(parts) or "no cost was recorded"


def cheapest_sentence(attacks: Sequence[Leak]) -> str | None:
    """The cheapest attack that gets most, in one sentence; None where no attack has power."""
    found = cheapest(attacks)
    if found is None:
        return None
    leak, finding = found
    left = 1 - finding.erased
    if left < WORTH:
        return (
            f"No attack got more than {left:.0%} of the knowledge; '{leak.name}' got most "
            f"({finding})."
        )
    return (
        f"The cheapest attack that gets most is '{leak.name}': with it {left:.0%} of the knowledge "
        f"is there ({finding}; {cost_words(leak)})."
    )


__all__ = ["WORTH", "cheapest", "cheapest_sentence", "cost", "cost_words"]
