"""Prefill: the assistant's turn already starts with "Sure, here is the answer:".

Refusals are decided in the first tokens of an answer. With those given, a model that only
learned to refuse goes on with what it knows. No token of the expected answer is ever given. The
starts are in ``prompts/attack_prefills.txt``.

Paper: arXiv 2404.02151 (prefilling); arXiv 2406.10890 uses affirmative suffixes on unlearned
models. Reference code: github.com/tml-epfl/llm-adaptive-attacks.
Deviations: a line break closes the start. The answer then begins a line, so that the same tokens
are scored whether or not a tokenizer joins a space to the word that follows.
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
    name="prefill",
    title="Prefilled answers",
    summary="Starts the answer with an affirmative phrase that the model has to continue.",
    paper="2404.02151",
    year=2024,
    family="prompt",
    needs=("forget",),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="quick",
    badges=("variant",),
    variant="Three fixed starts, closed by a line break, the same for every question.",
)
class Prefill(PromptAttack):
    """Options: how many forms."""

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt per start; empty where no assistant turn follows a user turn.

        A prefill that the prompt has already is kept, after the phrase.
        """
        if not prompt.messages or prompt.text is not None or prompt.messages[-1].role != "user":
            return ()
        return tuple(
            replace(prompt, prefill=f"{start}\n{prompt.prefill}")
            for start in read_lines("attack_prefills.txt")
        )
