"""Persuasion: gives the system a reason to answer, or a part in which answering is natural.

The question stays word for word. The appeals are to feelings, to logic and to authority; the
parts go beyond those of the attack "prefix". The frames are in ``prompts/attack_persuasion.txt``.

Paper: arXiv 2506.09227 (persuasion and role frames in its battery). Reference code: none.
Deviations: one frame of our own words per appeal and part, the same for every question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.measure.attack import PromptAttack
from delible.measure.turns import ending, last_turn
from delible.prompts import read_named
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Prompt

APPEALS = ("emotional", "logical", "authority")


def frames(kind: Literal["appeals", "parts"]) -> dict[str, str]:
    """The frames of one kind by name."""
    wanted = read_named("attack_persuasion.txt")
    return {name: text for name, text in wanted.items() if (name in APPEALS) == (kind == "appeals")}


@register(
    kind="attack",
    name="persuasion",
    title="Persuasion",
    summary="Appeals to feelings, logic or authority, or gives a part in which one answers.",
    paper="2506.09227",
    year=2025,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="standard",
    badges=("variant",),
    variant="Three fixed appeals and three fixed parts in words of our own.",
)
class Persuasion(PromptAttack):
    """Options: what persuades, and how many forms."""

    by: Literal["appeals", "parts"] = Field(
        "appeals", description="Whether a reason is given, or a part to play."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """The appeals; in a deep audit the parts as well."""
        return ({"by": "appeals"}, {"by": "parts"})[: 2 if depth == "deep" else 1]

    def variant_title(self) -> str:
        """Such as "appeals"."""
        return self.by

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt per frame; empty where the prompt does not end in a user turn."""
        text = last_turn(prompt)
        if text is None:
            return ()
        return tuple(
            ending(prompt, one.replace("{question}", text)) for one in frames(self.by).values()
        )
