"""An agent's loop: a system is asked for its next action until it answers or its budget is spent.

    messages -> role -> {"tool": …, "arguments": {…}} -> result -> messages -> … -> {"answer": …}

Each reply is read in a form and the arguments of a call are checked by the tool's own schema before
anything is done. What was wrong with a call is told to whoever made it, and costs a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from delible.component import Config
from delible.errors import nearest
from delible.memory.items import near
from delible.messages import Message
from delible.prompts import read_text
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.role import Role

Ended = Literal["answered", "steps", "tokens", "unreadable"]
#: What stands above rules in a system turn.
RULES = "Rules:"
#: What in an argument looks as if another one began.
MORE = re.compile(r", \w+=")


@dataclass(frozen=True)
class Tool:
    """Something that an agent may do.

    Attributes:
        name: By which it is called.
        about: What it does, in a sentence.
        arguments: What a call must fit.
        use: Does it; what it returns is shown.
    """

    name: str
    about: str
    arguments: type[BaseModel]
    use: Callable[[Any], str] = field(repr=False)

    def told(self) -> str:
        """For whoever may call it."""
        fields = self.arguments.model_json_schema().get("properties", {})
        names = ", ".join(f"{name} ({one.get('type', 'any')})" for name, one in fields.items())
        return f"{self.name}: {self.about} Arguments: {names or 'none'}."


class Action(BaseModel):
    """A call of a tool, or the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: str = ""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    answer: str = ""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.tool) == bool(self.answer):
            raise ValueError("either 'tool' or 'answer' is wanted")
        return self


class Budget(Config):
    """What one task may cost."""

    steps: int = Field(6, ge=1, description="Actions at most, the answer among them.")
    tokens: int = Field(4096, ge=1, description="Tokens that are asked for at most.")
    step_tokens: int = Field(256, ge=1, description="Tokens of one action at most.")
    context_letters: int = Field(
        24_000, ge=200, description="Letters of the conversation; the oldest results go first."
    )


@dataclass(frozen=True)
class Step:
    """One action and what came of it."""

    action: Action
    result: str


@dataclass(frozen=True)
class Episode:
    """A task from its beginning to its end.

    Attributes:
        answer: Empty unless it ended with one.
        ended: How.
        reason: Why there is no answer, where a reply could not be had.
    """

    task: str
    steps: tuple[Step, ...]
    answer: str
    ended: Ended
    reason: str = ""

    def lines(self) -> str:
        """JSON Lines: one for each step, and one for the end."""
        rows: list[dict[str, Any]] = [
            {"task": self.task, "step": number, **one.action.model_dump(exclude_defaults=True),
             "result": one.result}
            for number, one in enumerate(self.steps, start=1)
        ]  # fmt: skip
        rows.append({"task": self.task, "ended": self.ended, "answer": self.answer,
                     **({"reason": self.reason} if self.reason else {})})  # fmt: skip
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


#: Says what is done next, from what was done so far.
Choose = Callable[[Sequence[Step]], Action | NoAnswer]


def episode(choose: Choose, task: str, tools: Sequence[Tool], limits: Budget) -> Episode:
    """Does what is chosen, one action after the other, until there is an answer or no budget."""
    by_name = {one.name: one for one in tools}
    steps: list[Step] = []
    for number in range(limits.steps):
        if (number + 1) * limits.step_tokens > limits.tokens:
            return Episode(task, tuple(steps), "", "tokens")
        action = choose(steps)
        if isinstance(action, NoAnswer):
            return Episode(task, tuple(steps), "", "unreadable", action.reason)
        steps.append(Step(action, "" if action.answer else used(by_name, action)))
        if action.answer:
            return Episode(task, tuple(steps), action.answer, "answered")
    return Episode(task, tuple(steps), "", "steps")


def act(
    role: Role, task: str, tools: Sequence[Tool], budget: Budget | None = None, told: str = "",
    rules: str = "",
) -> Episode:  # fmt: skip
    """Lets a role work on a task.

    Args:
        told: What it is told besides, before the task.
        rules: What it has to keep to; they stand in the system turn of every call.
    """
    limits = budget or Budget()
    head = opened(task, tools, told, rules)

    def choose(steps: Sequence[Step]) -> Action | NoAnswer:
        done = [turn for one in steps for turn in turns(one)]
        prompt = Prompt(trimmed([*head, *done], limits.context_letters))
        return role.ask(prompt, Action, Decoding(max_new_tokens=limits.step_tokens))

    return episode(choose, task, tools, limits)


def opened(
    task: str, tools: Sequence[Tool], told: str = "", rules: str = "", words: str = "agent_act.txt"
) -> list[Message]:
    """The two turns with which a conversation about a task begins; ``words``: a prompt file."""
    system = read_text(words).format(tools="\n".join(one.told() for one in tools))
    return [
        Message(role="system", content=f"{system}\n\n{RULES}\n{rules}" if rules else system),
        Message(role="user", content=f"{told}\n\n{task}" if told else task),
    ]


def turns(step: Step) -> tuple[Message, Message]:
    """A call and its result, as whoever made it is told."""
    return (
        Message(role="assistant", content=step.action.model_dump_json(exclude_defaults=True)),
        Message(role="user", content=f"Result: {step.result}"),
    )


def used(tools: Mapping[str, Tool], action: Action) -> str:
    """The result of a call, or what is wrong with it."""
    tool = tools.get(action.tool)
    if tool is None:
        return f"There is no tool '{action.tool}'. {nearest(action.tool, tools)}"
    try:
        arguments = tool.arguments.model_validate(action.arguments)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"The arguments do not fit: {where}: {first['msg']}."
    return tool.use(arguments)


def canonical(action: Action) -> str:
    """An action as one text: its tool and arguments, alike for case, spaces and their order."""
    if action.answer:
        return near(action.answer)
    parts = [f"{key}={_plain(action.arguments[key])}" for key in sorted(action.arguments)]
    return f"{near(action.tool)}({', '.join(parts)})"


def _plain(value: Any) -> str:
    text = near(value) if isinstance(value, str) else near(repr(value))
    if isinstance(value, str) and MORE.search(text):  # else one argument could pass for two
        return json.dumps(text, ensure_ascii=False)
    return text


def trimmed(messages: Sequence[Message], letters: int) -> tuple[Message, ...]:
    """A conversation of at most so many letters: the first two turns and the newest pairs."""
    head, pairs = list(messages[:2]), list(messages[2:])
    while pairs and sum(len(one.text) for one in (*head, *pairs)) > letters:
        del pairs[:2]
    return (*head, *pairs)


def write_trace(path: Path, episode: Episode) -> None:
    """Appends an episode to a file of traces. Nothing of it is forgotten by a memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(episode.lines())


__all__ = [
    "RULES", "Action", "Budget", "Choose", "Episode", "Step", "Tool", "act", "canonical", "episode",
    "opened", "trimmed", "turns", "used", "write_trace",
]  # fmt: skip
