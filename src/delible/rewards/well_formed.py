"""Well formed: a gate against gibberish, loops, and answers in another script than the question.

    1 if the answer is language and its letters are of the question's script, else 0

Not of a paper: gibberish and a switch of the script earn everything where only words are forbidden.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from delible.registry import register
from delible.train.onpolicy.rewards import Reward
from delible.train.onpolicy.rows import Completion, Scored
from delible.world import filters


def scripts(text: str) -> Counter[str]:
    """Letters by script, as the names of characters begin: LATIN, CYRILLIC, CJK …"""
    letters = (unicodedata.name(char, "") for char in text if char.isalpha())
    return Counter(name.partition(" ")[0] for name in letters)


def same_script(text: str, question: str, share: float) -> bool:
    """Whether so large a share of the text's letters is of the question's main script."""
    asked, said = scripts(question), scripts(text)
    if not asked or not said:
        return True
    main = asked.most_common(1)[0][0]
    return said[main] >= share * sum(said.values())


@register(
    kind="reward",
    name="well_formed",
    title="Well formed",
    summary="1 for answers that are language, in the question's script, else 0; a gate by default.",
    family="guard",
    range="{0, 1}",
    direction="High: language.",
    misleads="Fluent nonsense is well formed.",
)
class WellFormed(Reward):
    """Options of the form."""

    gate: bool = Field(True, description="Multiply the sum of rewards by it.")
    share: float = Field(0.8, ge=0, le=1, description="Share of letters in the question's script.")

    def score(self, completions: Sequence[Completion]) -> list[Scored]:
        results = []
        for one in completions:
            if filters.is_garbage(one.text):
                results.append(Scored(0.0, ("garbage",)))
            elif not same_script(one.text, one.question.text, self.share):
                results.append(Scored(0.0, ("other script",)))
            else:
                results.append(Scored(1.0))
        return results
