"""From a request to forget to what an agent is told before every task.

    u = C(type, target, category, card) = (unknown, rule, allowed, disclosure)

by fixed sentences, or by a role whose reply is checked: it must keep to the budget and must not
give the target away, because an agent can be talked into repeating what it was told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from delible.acting.loop import Action, canonical
from delible.acting.mask import WORD, folded
from delible.component import Config
from delible.errors import DataError
from delible.memory.items import strings
from delible.names import Names
from delible.prompts import read_named, read_text
from delible.system.asks import NoAnswer, Prompt
from delible.system.role import Role

Type = Literal["state", "trajectory", "environment"]
Wording = Literal["neutral", "category", "named"]
WORDS = "agent_forget.txt"


class Request(Config):
    """What is to be forgotten.

    Attributes:
        target: The name of a thing or place, of a routine, or of an environment.
        category: What it is, in a word or two; it may be told, the target may not.
        actions: Of a trajectory, in order.
    """

    type: Type
    target: str = ""
    category: str = ""
    actions: tuple[Action, ...] = ()

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.type == "trajectory":
            if len(self.actions) < 2:
                raise ValueError("a trajectory has two actions at least: one alone stays allowed")
        elif not folded(self.target):
            raise ValueError("a target is wanted")
        return self


class Unlearning(BaseModel):
    """What the agent is told for one request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unknown: str = Field(min_length=1)
    rule: str = Field(min_length=1)
    allowed: str = Field(min_length=1)
    disclosure: str = Field(min_length=1)

    def lines(self) -> tuple[str, ...]:
        return (self.unknown, self.rule, self.allowed, self.disclosure)


def tokens(text: str) -> int:
    """An estimate from above for plain English: words and signs, long words in parts of four."""
    return sum(math.ceil(len(one) / 4) for one in re.findall(r"\w+|[^\w\s]", text))


def given_away(text: str, request: Request) -> list[str]:
    """Words of the target that a text holds, and its name; the words of its category may stand."""
    fields = " ".join(read_named(WORDS).values())
    free = {folded(one) for one in WORD.findall(f"{fields} {request.category}")}
    names = [one for one in (request.target, *_told(request.actions)) if folded(one)]
    said = {folded(one) for one in WORD.findall(text)}
    found = [one for one in names if Names([one]).occur(text)]
    words = [one for name in names for one in WORD.findall(name)]
    found += [one for one in words if folded(one) in said - free and len(one) > 1]
    return list(dict.fromkeys(found))


def _told(actions: Iterable[Action]) -> list[str]:
    return [text for one in actions for text in strings(one.arguments)]


def by_rules(request: Request, wording: Wording) -> Unlearning:
    """The prompt for a request, from fixed sentences."""
    way = "neutral" if wording == "category" and not request.category else wording
    shown = "; ".join(map(canonical, request.actions)) if request.actions else request.target
    return by_rules_of(request.type, way, request.category, shown)


def by_rules_of(kind: Type, wording: Wording, category: str = "", target: str = "") -> Unlearning:
    """The same for a kind of request."""
    lines = read_named(WORDS)
    named = lines.get(f"rule_{kind}_named") if wording == "named" else None
    return Unlearning(
        unknown=lines[f"unknown_{wording}"].format(category=category, target=target),
        rule=(named or lines[f"rule_{kind}"]).format(target=target),
        allowed=lines[f"allowed_{kind}"],
        disclosure=lines["disclosure"],
    )


def converted(
    request: Request, wording: Wording = "neutral", budget: int = 150, role: Role | None = None,
    card: str = "",
) -> tuple[Unlearning, str, str]:  # fmt: skip
    """C: the prompt for a request, who wrote it, and why not the role if there is one.

    Args:
        budget: Tokens at most.
        card: What the agent can do: shown to the role.

    Raises:
        DataError: The rules' own prompt does not fit the budget (a long target that is named).
    """
    reason = ""
    if role is not None:

        class Checked(Unlearning):
            @model_validator(mode="after")
            def _kept_to(self) -> Self:
                text = " ".join(self.lines())
                if wording != "named" and given_away(text, request):
                    raise ValueError("it quotes the target or a part of it")
                if tokens(text) > budget:
                    raise ValueError(f"it is longer than {budget} tokens")
                return self

        asked = {"type": request.type, "target": request.target, "category": request.category,
                 "actions": list(map(canonical, request.actions)), "card": card}  # fmt: skip
        told = read_text("agent_convert.txt").format(budget=budget // 2)
        reply = role.ask(Prompt.ask(json.dumps(asked, ensure_ascii=False), system=told), Checked)
        if not isinstance(reply, NoAnswer):
            return Unlearning.model_validate(reply.model_dump()), role.name, ""
        reason = reply.reason
    prompt = by_rules(request, wording)
    if (count := tokens(" ".join(prompt.lines()))) > budget:
        raise DataError(
            f"the prompt has {count} tokens, and {budget} are allowed.",
            where="a request to forget",
            hint="Set prompt_tokens higher, or name it less closely.",
        )
    return prompt, "rules", reason


def composed(prompts: Sequence[tuple[Type, Unlearning]], budget: int) -> str:
    """Several prompts as one: each sentence once, or the rules' own ones if that is too long."""
    lines = list(dict.fromkeys(line for _, one in prompts for line in one.lines()))
    if tokens("\n".join(lines)) > budget:
        plain = [by_rules_of(kind, "neutral") for kind in dict.fromkeys(one for one, _ in prompts)]
        lines = list(dict.fromkeys(line for one in plain for line in one.lines()))
    return "\n".join(lines)


__all__ = ["Request", "Type", "Unlearning", "Wording", "by_rules", "composed", "converted",
           "given_away", "tokens"]  # fmt: skip
