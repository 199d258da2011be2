"""Roles: failed calls, unreadable replies, spent budgets, and replies that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.measure.cache import Cache
from delible.measure.starting import roles_of, started, with_writer
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.forms import read_form
from delible.system.role import Role, RoleOptions
from delible.system.roles import Roles
from delible.systems.scripted import Line, Scripted


class Verdict(BaseModel):
    score: int = Field(ge=0, le=10)
    reason: str = ""


ASKED = Prompt.ask("Is it good?")
FAILED = NoAnswer("the line is dead")


def judge(*script: Line, **options: int) -> tuple[Role, Scripted]:
    system = Scripted(list(script))
    return Role("judge", system, RoleOptions(**options)), system


def test_a_readable_reply_is_the_form() -> None:
    role, system = judge('I think so.\n```json\n{"score": 7, "reason": "so"}\n```')
    assert role.ask(ASKED, Verdict) == Verdict(score=7, reason="so")
    assert system.prompts == [ASKED]


def test_a_reply_that_cannot_be_read_is_asked_again_with_what_is_wrong() -> None:
    role, system = judge('{"score": 17}', '{"score": 7}')
    assert role.ask("Is it good?", Verdict) == Verdict(score=7)
    first, second = system.prompts
    assert first == ASKED
    assert [turn.role for turn in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1].content == '{"score": 17}'
    assert "score: Input should be less than or equal to 10" in second.messages[2].content


def test_a_reply_that_stays_unreadable_is_no_answer() -> None:
    role, system = judge("yes", "yes", "yes", '{"score": 7}', attempts=3)
    found = role.ask(ASKED, Verdict)
    assert isinstance(found, NoAnswer)
    assert "after 3 attempts: there is no JSON in it" in found.reason
    assert len(system.prompts) == 3


def test_a_failed_call_is_made_again_and_never_an_answer() -> None:
    role, system = judge(FAILED, '{"score": 7}', retries=1)
    assert role.ask(ASKED, Verdict) == Verdict(score=7)
    assert system.prompts == [ASKED, ASKED]  # nothing was unreadable
    role, system = judge(FAILED, FAILED, '{"score": 7}', retries=1)
    assert role.ask(ASKED, Verdict) == FAILED
    assert len(system.prompts) == 2


def test_a_lost_connection_is_a_failed_call_and_a_bug_is_not() -> None:
    role, _ = judge(ConnectionError("reset"), "fine", retries=1)
    assert role.generate([ASKED], Decoding()) == ["fine"]
    role, _ = judge(ConnectionError("reset"), retries=0)
    (found,) = role.generate([ASKED], Decoding())
    assert isinstance(found, NoAnswer)
    assert found.reason == "the judge could not be asked (ConnectionError: reset)"
    role, _ = judge(ValueError("a bug"), "fine", retries=1)
    with pytest.raises(ValueError, match="a bug"):
        role.generate([ASKED], Decoding())


def test_only_the_failed_ones_of_many_are_asked_again_in_their_order() -> None:
    role, system = judge("a", FAILED, "c", "b", retries=2)
    prompts = [Prompt.ask(name) for name in "xyz"]
    assert role.generate(prompts, Decoding()) == ["a", "b", "c"]
    assert [prompt.messages[0].content for prompt in system.prompts] == ["x", "y", "z", "y"]


@pytest.mark.parametrize(
    ("options", "spent"), [({"calls": 2}, "2 calls"), ({"tokens": 99}, "99 tokens")]
)
def test_a_spent_budget_is_an_error_that_says_so(options: dict[str, int], spent: str) -> None:
    role, system = judge(*"abcd", **options)
    two = [Prompt.ask(name) for name in "xy"]
    assert role.generate(two, Decoding(max_new_tokens=40)) == ["a", "b"]
    with pytest.raises(RunError, match=rf"role 'judge' \(scripted\): the budget of {spent} is"):
        role.generate(two[:1], Decoding(max_new_tokens=40))
    assert len(system.prompts) == 2  # nothing was asked
    assert (role.spent.calls, role.spent.tokens) == (2, 80)


def test_replies_are_kept_failed_and_unnamed_ones_are_not(tmp_path: Path) -> None:
    def asked(script: list[Line], fingerprint: str | None = "one") -> tuple[object, int]:
        system = Scripted(script, fingerprint=fingerprint)
        role = Role("judge", system, RoleOptions(retries=0), Cache(tmp_path))
        return role.ask(ASKED, Verdict), len(system.prompts)

    assert asked([FAILED]) == (FAILED, 1)
    assert asked(['{"score": 7}']) == (Verdict(score=7), 1)
    assert asked(['{"score": 1}']) == (Verdict(score=7), 0)
    assert asked(['{"score": 2}'], "another") == (Verdict(score=2), 1)
    assert asked(['{"score": 3}'], None) == (Verdict(score=3), 1)
    assert asked(['{"score": 4}'], None) == (Verdict(score=4), 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"score": 1} no: {"score": 2}', 2),  # the last one counts
        ('{"score": 2} {"other": 1}', 2),
        ("{'score': 3, reason: 'because',}", 3),
        ('{"score": 4, "reason": "she said "no" twice"}', 4),
        ('<think>{"score": 9}</think>{"score": 5,}', 9),  # whole JSON before JSON with slips
        ('[{"score": 1,}, {"score": 6,}]', 6),
        ('{"score": 1', None),  # cut off: it may have been 10
        ('{"score": 7, "reason": "it beg', None),
        ("", None),
        ("{" * 3000, None),
        ('{"score": null}', None),
    ],
)
def test_forms(text: str, found: int | None) -> None:
    read = read_form(text, Verdict)
    assert (read.score if isinstance(read, Verdict) else None) == found
    assert isinstance(read, Verdict) or read


def test_who_plays_what() -> None:
    system: System = Scripted(["x"], name="mine")
    opened: list[str] = []

    def opens(name: str) -> System:
        opened.append(name)
        return system

    roles = Roles(
        {"judge": "a#b", "writer": system, "critic": {"system": "a#b", "calls": 3}}, opens
    )
    context = Context(roles=roles)
    assert opened == []
    assert context.role("judge") is context.role("judge")
    assert context.role("critic").options.calls == 3
    assert opened == ["a#b"]  # once for both, while somebody uses it
    assert context.role("writer").system is system
    assert context.plays("guard") is None
    with pytest.raises(RecipeError, match=r"nobody plays the guard.*--role guard=MODEL"):
        context.role("guard")
    assert roles.named() == {
        "critic": {"system": "a#b", "calls": 3}, "judge": "a#b", "writer": "mine"
    }  # fmt: skip


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown role 'juge'.*'judge'"):
        roles_of({"juge": "default"})
    with pytest.raises(RecipeError, match=r"unknown option 'call'.*'calls'"):
        roles_of({"judge": {"system": "x", "call": 3}}).role("judge")
    with pytest.raises(RecipeError, match="not said who plays it"):
        roles_of({"judge": {"calls": 3}}).role("judge")
    with pytest.raises(RecipeError, match="'seed' and 'context' are both given"):
        started(Context(), seed=3)
    assert started(Context(seed=2)).seed == 2


def test_scripts() -> None:
    known = Scripted({"Who?": "Ada."})
    assert known.generate([Prompt.ask("Who?"), Prompt.ask("Why?")], Decoding()) == [
        "Ada.", NoAnswer("the script does not know this question"),
    ]  # fmt: skip
    assert known.calls == 1
    assert Scripted(lambda prompt: prompt.messages[0].content.upper()).generate(
        [Prompt.ask("no")], Decoding()
    ) == ["NO"]
    short = Scripted(["one"])
    assert short.generate([ASKED, ASKED], Decoding()) == ["one", NoAnswer("the script has ended")]


def test_the_model_itself_may_play() -> None:
    model = Scripted(["x", "y"], name="model")
    named = {"writer": "self", "judge": {"system": "self", "calls": 1}, "critic": "other"}
    context = Context(roles=started(None, roles=named).roles.with_itself(model))
    assert context.role("writer").system is model
    judge = context.role("judge")
    assert (judge.system, judge.options.calls) == (model, 1)
    assert context.roles.players["critic"] == "other"
    plain = Context(roles=Roles({"judge": "other"}))
    assert plain.roles.with_itself(model) is plain.roles
    assert plain.roles.with_itself(model, ["guard"]).role("guard").system is model


def test_a_writer_is_given_once() -> None:
    assert with_writer({"judge": "a"}, "b") == {"judge": "a", "writer": "b"}
    assert with_writer(None, None) == {}
    with pytest.raises(RecipeError, match="given twice"):
        with_writer({"writer": "a"}, "b")
