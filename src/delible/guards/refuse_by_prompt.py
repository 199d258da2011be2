"""Refuse by prompt: an instruction before the conversation says that the targets are unknown.

    answer(prompt)  ->  answer(instruction(targets) + prompt)

Paper: RWKU (arXiv 2406.10890), its baseline "in-context unlearning"; the wording is our own.
Differences, on purpose: with `names: seen` only targets that the conversation names are told of,
and a conversation that names none passes as it is, so that it works for many targets. Nothing is
checked afterwards: put another guard before it (a guarded system can be guarded).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from delible import prompts as prompt_files
from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.messages import Message
from delible.names import Names
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.guarded import Guard, GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Forward, Judged

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with an instruction before everything else: in the system turn, or the text."""
    if prompt.text is not None and not prompt.messages:
        return _with(prompt, (), f"{instruction}\n\n{prompt.text}")
    first, *rest = prompt.messages or (Message(role="system", content=""),)
    if first.role == "system":
        told = f"{instruction}\n\n{first.text}" if first.text else instruction
        return _with(prompt, (first.with_text(told), *rest), prompt.text)
    turns = (Message(role="system", content=instruction), first, *rest)
    return _with(prompt, turns, prompt.text)


def _with(prompt: Prompt, messages: tuple[Message, ...], text: str | None) -> Prompt:
    return Prompt(messages, prompt.prefill, text, prompt.tools, prompt.tool_choice)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


class RefuseByPromptMind(GuardMind):
    """The instruction, ready; made by :class:`RefuseByPrompt`."""

    reads, threaded = "words", False

    def __init__(
        self,
        targets: dict[str, list[str]],
        template: str,
        only_seen: bool,
        refusals: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.targets, self.template, self.only_seen = targets, template, only_seen
        self.refusals, self._fingerprint = refusals, fingerprint
        self._owners = {name: target for target, names in targets.items() for name in names}
        self._names = Names(self._owners)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        told = list(self.targets)
        if self.only_seen:
            seen = self._names.find("\n".join(texts_of(prompt)))
            told = list(dict.fromkeys(self._owners[match.name] for match in seen))
        if not told:
            return None
        return Forward(instructed(prompt, self.template.replace("{names}", listed(told))))


@register(
    kind="guard",
    name="refuse_by_prompt",
    title="Refuse by prompt",
    summary="Tells the model before each conversation that it knows nothing about the targets.",
    paper="2406.10890",
    year=2024,
    family="Guard",
    intention="suppression",
    mechanism="input",
    needs=("names",),
    changes="Nothing in the model; an instruction goes before the conversation.",
    reversible=True,
    retrain_goal=False,
    weakest="A question that speaks of the target without its name, or overrides the instruction.",
    capability="generate",
    badges=("variant",),
    variant="Our own wording; only the targets that a conversation names, where asked for.",
)
class RefuseByPrompt(Guard):
    """Options of the instruction."""

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    names: Literal["all", "seen"] = Field(
        "all", description="Tell of all targets always, or only of those that are named."
    )
    instruction: str | None = Field(
        None, description="Another instruction; {names} stands for the targets."
    )

    def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> RefuseByPromptMind:
        """Builds the instruction.

        Raises:
            DataError: The request names no target.
        """
        named = (record.subject for record in request.forget if record.subject)
        targets = {name: [name] for name in (*request.subjects, *named)}
        for subject, aliases in self.aliases.items():
            targets.setdefault(subject, [subject]).extend(aliases)
        if not targets:
            raise DataError(
                "the forget request names no target.",
                where="guard 'refuse_by_prompt'",
                hint="Give names (--subjects NAME,…) or forget records with a subject.",
            )
        template = self.instruction or " ".join(prompt_files.read_lines("guard_instruction.txt"))
        judged_by = [VERSION, self.spec(), targets, template]
        return RefuseByPromptMind(
            targets,
            template,
            self.names == "seen",
            self.refusals,
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )
