"""Length: a gate against answers that say nothing, and against those that never end.

    1 if least <= words <= most (and the answer ended by itself, if that is wanted), else 0

Not of a paper: empty answers earn everything where only words are forbidden, and recall can be had
by rambling.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from delible.registry import register
from delible.train.onpolicy.rewards import Reward
from delible.train.onpolicy.rows import Completion, Scored
from delible.world import filters


def fits(words: int, least: int, most: int | None) -> bool:
    """Whether a length is within both ends."""
    return words >= least and (most is None or words <= most)


@register(
    kind="reward",
    name="length",
    title="Length",
    summary="1 for answers of a length within limits, else 0; a gate by default.",
    family="guard",
    range="{0, 1}",
    direction="High: neither empty nor endless.",
    misleads="Words without meaning have a length, too.",
)
class Length(Reward):
    """Options of the length."""

    gate: bool = Field(True, description="Multiply the sum of rewards by it.")
    least: int = Field(2, ge=0, description="Words at least.")
    most: int | None = Field(None, ge=1, description="Words at most; none: no limit.")
    ended: bool = Field(False, description="Only answers that ended by themselves.")

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        results = []
        for one in completions:
            words = len(filters.words(one.text))
            fine = fits(words, self.least, self.most) and (one.finished or not self.ended)
            hits = () if fine else ("too short" if words < self.least else "too long",)
            results.append(Scored(float(fine), hits))
        return results
