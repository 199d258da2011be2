"""The loop: calls that are checked, budgets, traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from delible.acting.loop import Action, Budget, Tool, act, trimmed, write_trace
from delible.acting.world_tasks import passages, questions, search_tool
from delible.memory import Memory
from delible.messages import Message
from delible.system.asks import NoAnswer
from delible.system.role import Role, RoleOptions
from delible.systems.scripted import Scripted
from delible.world import World


class Sum(BaseModel):
    a: int
    b: int = Field(ge=0)


def adder(seen: list[Any]) -> Tool:
    def use(asked: Sum) -> str:
        seen.append(asked)
        return str(asked.a + asked.b)

    return Tool("add", "Adds two numbers.", Sum, use)


def role(*lines: Any) -> tuple[Role, Scripted]:
    system = Scripted(list(lines))
    return Role("planner", system, RoleOptions(attempts=2)), system


def call(**arguments: Any) -> str:
    return json.dumps({"tool": "add", "arguments": arguments})


def test_it_calls_looks_and_answers(tmp_path: Path) -> None:
    seen: list[Any] = []
    who, system = role(f"Let me see. {call(a=2, b=3)}", '{"answer": "5"}')
    episode = act(who, "What is 2 + 3?", [adder(seen)], told="Take care.")
    assert (episode.answer, episode.ended, len(episode.steps)) == ("5", "answered", 2)
    assert seen == [Sum(a=2, b=3)]
    first, second = system.prompts
    assert "add: Adds two numbers. Arguments: a (integer), b (integer)." in first.messages[0].text
    assert '{"tool": NAME, "arguments": {...}}' in first.messages[0].text
    assert first.messages[1].text == "Take care.\n\nWhat is 2 + 3?"
    assert second.messages[-1].text == "Result: 5"
    for _ in range(2):
        write_trace(tmp_path / "t" / "traces.jsonl", episode)
    rows = [json.loads(line) for line in (tmp_path / "t" / "traces.jsonl").open(encoding="utf-8")]
    assert len(rows) == 6
    assert rows[0] == {"task": "What is 2 + 3?", "step": 1, "tool": "add",
                       "arguments": {"a": 2, "b": 3}, "result": "5"}  # fmt: skip
    assert rows[2] == {"task": "What is 2 + 3?", "ended": "answered", "answer": "5"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (call(a="x", b=1), "arguments do not fit: a"), (call(a=1, b=-1), "do not fit: b"),
        (call(a=1), "do not fit: b"), ('{"tool": "ad"}', "no tool 'ad'. Did you mean 'add'"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_told_and_not_made(wrong: str, told: str) -> None:
    seen: list[Any] = []
    who, system = role(wrong, '{"answer": "none"}')
    episode = act(who, "?", [adder(seen)])
    assert seen == []
    assert told in system.prompts[1].messages[-1].text
    assert episode.answer == "none"


def test_budgets_end_it() -> None:
    who, system = role(*[call(a=1, b=1)] * 9)
    assert act(who, "?", [adder([])], Budget(steps=3)).ended == "steps"
    assert system.calls == 3
    who, system = role(*[call(a=1, b=1)] * 9)
    spent = act(who, "?", [adder([])], Budget(tokens=100, step_tokens=40))
    assert (spent.ended, system.calls, len(spent.steps)) == ("tokens", 2, 2)


def test_what_cannot_be_read_is_no_answer() -> None:
    for lines in (["nothing", "no JSON"], ['{"tool": "add", "answer": "5"}'] * 2, [NoAnswer("no")]):
        who, _ = role(*lines)
        episode = act(who, "?", [adder([])])
        assert (episode.ended, episode.answer) == ("unreadable", "")
        assert episode.reason


def test_old_results_go_first() -> None:
    turns = [Message(role="user", content=letter * 100) for letter in "abcdefgh"]
    kept = "".join(one.text[0] for one in trimmed(turns, 600))
    assert kept == "abefgh"
    assert "".join(one.text[0] for one in trimmed(turns, 50)) == "ab"
    assert Action(answer="x").tool == ""


def test_the_world_judges_exactly(tmp_path: Path) -> None:
    world = World(people=6, seed=1)
    memory = Memory(tmp_path)
    memory.add(passages(world))
    tool = search_tool(memory)
    asked = questions(world)
    for one in asked[:20]:
        assert one.reward(one.record.answer) == 1
        assert one.reward(f"  {one.record.answer.upper()}. ") == 1
        assert one.reward(one.record.perturbed[0]) == 0
        assert one.reward("") == 0
    found = tool.use(tool.arguments(query=asked[0].text, count=8))
    assert asked[0].subject in found
    assert tool.use(tool.arguments(query="zzzz")) == "Nothing was found."
    assert {one.subject for one in questions(world, [world.people[2].name])} == {
        world.people[2].name
    }
