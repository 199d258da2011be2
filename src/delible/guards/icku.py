"""ICKU: in-context knowledge unlearning. The targets are tagged in the prompt; a model that was
taught the protocol then answers "forgot" to what concerns them.

    answer(prompt)  ->  answer(<<UNL>> targets <</UNL>> + prompt)       "forgot"  ->  a refusal

Paper: arXiv 2410.00382; code: seele1917/test-time-in-context-unlearning. The model is taught once
(`delible unlearn MODEL --method icku`), for targets that it need not know then. The block stands
before the last turn of the user, one target a line. Only the guard can write a tag: in all that
comes from outside, tags are taken out before (also look-alikes, and such as are cut over turns).

The model pretends: the answer is still computed, and a started answer may bring it out.
Differences, on purpose: subjects are tagged and not answers, so that no secret stands in the prompt
(`tag: answer` is the paper's for TOFU); the protocol's word becomes a refusal (`refuse: false`
leaves it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.lm.new_tokens import token_of
from delible.messages import Message, TextPart, Tool, ToolCall
from delible.names import Names, fold
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.tags import FORGOT, TAGS, neutralised, tagged
from delible.systems.guarded import Guard, GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Forward, Judged
from delible.systems.record_texts import answers_of

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1

Tag = Literal["subject", "answer"]
#: Makes one text of a prompt into another.
Change = Callable[[str], str]


def rewritten(prompt: Prompt, change: Change) -> Prompt:
    """The prompt with every text in it changed, always in the same order."""
    turns = tuple(_turn(turn, change) for turn in prompt.messages)
    text = None if prompt.text is None else change(prompt.text)
    prefill = change(prompt.prefill)
    tools = tuple(_tool(tool, change) for tool in prompt.tools)
    choice = None if prompt.tool_choice is None else change(prompt.tool_choice)
    return replace(
        prompt, messages=turns, text=text, prefill=prefill, tools=tools, tool_choice=choice
    )


def _turn(turn: Message, change: Change) -> Message:
    content: Any
    if isinstance(turn.content, str):
        content = change(turn.content)
    else:
        content = tuple(
            TextPart(text=change(part.text)) if isinstance(part, TextPart) else part
            for part in turn.content
        )
    calls = tuple(
        ToolCall(id=one.id, name=change(one.name), arguments=_json(one.arguments, change))
        for one in turn.tool_calls
    )
    return turn.model_copy(update={"content": content, "tool_calls": calls})


def _tool(tool: Tool, change: Change) -> Tool:
    return Tool(
        name=change(tool.name),
        description=change(tool.description),
        parameters=_json(tool.parameters, change),
    )


def _json(written: str, change: Change) -> str:
    """A JSON text with the texts in it changed, and as it was if none is; other text as a text."""
    try:
        read = json.loads(written)
    except (ValueError, RecursionError):
        return change(written)
    made = _values(read, change)
    return written if made == read else json.dumps(made, ensure_ascii=False)


def _values(value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _values(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_values(inner, change) for inner in value]
    return value


def without_tags(prompt: Prompt) -> Prompt:
    """The prompt with no tag in it; the same one if it has none."""
    texts: list[str] = []

    def noted(text: str) -> str:
        texts.append(text)
        return text

    rewritten(prompt, noted)
    cleaned = neutralised(texts)
    if cleaned == texts:
        return prompt
    left = iter(cleaned)
    return rewritten(prompt, lambda _: next(left))


def with_block(prompt: Prompt, items: Sequence[str]) -> Prompt:
    """The prompt with the items tagged: before the last turn of the user, or before the text."""
    if prompt.text is not None and not prompt.messages:
        return replace(prompt, text=tagged(prompt.text, items))
    places = [place for place, turn in enumerate(prompt.messages) if turn.role == "user"]
    if not places:
        said = Message(role="user", content=tagged("", items))
        return replace(prompt, messages=(*prompt.messages, said))
    turns = list(prompt.messages)
    last = turns[places[-1]]
    turns[places[-1]] = last.with_text(tagged(last.text, items))
    return replace(prompt, messages=tuple(turns))


class IckuMind(GuardMind):
    """The items to tag, ready; made by :class:`Icku`.

    Args:
        items: What is tagged, by target.
        names: All names of each target.
        only_seen: Only targets that the conversation names.
        refuses: The protocol's word becomes a refusal.
    """

    reads, threaded = "sentences", False

    def __init__(
        self,
        items: Mapping[str, Sequence[str]],
        names: Mapping[str, Sequence[str]],
        only_seen: bool,
        refuses: bool,
        refusals: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.items, self.only_seen, self.refuses = items, only_seen, refuses
        self.refusals, self._fingerprint = refusals, fingerprint
        self._owners = {name: target for target, known in names.items() for name in known}
        self._names = Names(self._owners if only_seen else ())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        targets = list(self.items)
        if self.only_seen:
            seen = {self._owners[match.name] for match in self._names.find(_read(prompt))}
            targets = [target for target in targets if target in seen]
        items = list(dict.fromkeys(item for target in targets for item in self.items[target]))
        clean = without_tags(prompt)
        if not items:
            return None if clean is prompt else Forward(clean)
        return Forward(with_block(clean, items))

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        if self.refuses and not since and fold(answer).words() == [FORGOT]:
            return self.refuse(prompt)
        return None


def _read(prompt: Prompt) -> str:
    return "\n".join(texts_of(prompt))  # joined: a name over two turns is one name again


@register(
    kind="guard",
    name="icku",
    title="In-context knowledge unlearning",
    summary="Tags the targets in the prompt of a model that was taught to know nothing tagged.",
    paper="2410.00382",
    year=2024,
    family="Guard",
    intention="suppression",
    mechanism="input",
    needs=("names", "weights"),
    changes="Nothing in the model that was taught the protocol; a block goes before the question.",
    reversible=True,
    retrain_goal=False,
    weakest="A started answer, and a question that speaks of the target without its name.",
    capability="generate",
    badges=("variant",),
    variant="Subjects are tagged, not answers; the protocol's word becomes a refusal; several "
    "targets stand one a line.",
)
class Icku(Guard):
    """Options of the block."""

    taught: ClassVar[str | None] = "icku"

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    tag: Tag = Field(
        "subject",
        description="What stands in the block: subjects, or the forgotten answers themselves.",
    )
    names: Literal["all", "seen"] = Field(
        "all", description="Tag all targets always, or only those that are named."
    )
    refuse: bool = Field(
        True, description="An answer that is the protocol's word becomes a refusal."
    )

    def seated(self, system: System, context: Context) -> Context:
        """As for every guard.

        Raises:
            ModelError: The system is a model that was not taught the protocol.
        """
        if isinstance(system, LM) and any(token_of(system, tag) is None for tag in TAGS):
            raise ModelError(
                f"the model '{system.name}' was not taught the forget protocol.",
                where="guard 'icku'",
                hint="Teach it once: delible unlearn MODEL --method icku --forget RECORDS "
                "(any that it knows).",
            )
        return super().seated(system, context)

    def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> IckuMind:
        """Gathers what is tagged.

        Raises:
            DataError: The request names no target, or (``tag: answer``) has no answers.
        """
        named = (record.subject for record in request.forget if record.subject)
        names = {name: [name] for name in (*request.subjects, *named)}
        for subject, aliases in self.aliases.items():
            names.setdefault(subject, [subject]).extend(aliases)
        items: dict[str, list[str]] = {name: list(known) for name, known in names.items()}
        if self.tag == "answer":
            items = {}
            for record in request.forget:
                if record.subject:
                    items.setdefault(record.subject, []).extend(answers_of(record)[:1])
        if not items:
            raise DataError(
                "the forget request names no target.",
                where="guard 'icku'",
                hint="Give names (--subjects NAME,…) or forget records with a subject"
                + (", not only names: answers are tagged." if self.tag == "answer" else "."),
            )
        judged_by = [VERSION, self.spec(), names, items, self.refusals]
        return IckuMind(
            items,
            names,
            self.names == "seen",
            self.refuse,
            self.refusals,
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )
