"""Prefix: puts a role, an instruction or a claim of authority before the question.

The question itself stays word for word. The frames are in ``prompts/attack_prefixes.txt``.

Paper: arXiv 2406.10890 (prefix injection and role playing among its nine attacks).
Reference code: github.com/jinzhuoran/RWKU. Deviations: the frames are our own words and the same
for every record, where the paper's are written per question by a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from delible.measure.attack import PromptAttack
from delible.prompts import read_lines
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Prompt


@register(
    kind="attack",
    name="prefix",
    title="Role and instruction prefixes",
    summary="Presses for the answer with a role or an instruction before the question.",
    paper="2406.10890",
    year=2024,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="quick",
    badges=("variant",),
    variant="Five fixed frames in words of our own instead of one written per question.",
)
class Prefix(PromptAttack):
    """Options: how many forms."""

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt per frame; empty where the prompt does not end in a user turn."""
        if not prompt.messages or prompt.text is not None or prompt.messages[-1].role != "user":
            return ()
        *earlier, last = prompt.messages
        contents = [f"{frame}\n\n{last.text}" for frame in read_lines("attack_prefixes.txt")]
        return tuple(
            replace(prompt, messages=(*earlier, last.with_text(content))) for content in contents
        )
