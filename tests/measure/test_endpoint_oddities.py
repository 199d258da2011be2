"""What real servers do: refuse options, drop connections, hide failures in a 200, think aloud."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from completions_server import Asked, Reply, serving

from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
)
from delible.system.base import BlackBox
from delible.systems.completions import wanted_wait
from delible.systems.endpoint import ROOM_TO_THINK, Endpoint

WHO = Prompt.ask("Who?")
QUICK: dict[str, Any] = {"backoff_seconds": 0.01, "timeout_seconds": 5.0}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("DELIBLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def failing(*replies: Reply) -> Callable[[Asked], Reply]:
    """The replies one after the other, the last one for ever."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def error(message: str, status: int = 400, **more: Any) -> Reply:
    return Reply(status=status, body=json.dumps({"error": {"message": message, **more}}).encode())


def ask(reply: Callable[[Asked], Reply], decoding: Decoding | None = None) -> tuple[Any, Any, Any]:
    """(the answers to one question asked twice, the endpoint, the server)"""
    with serving(reply) as server:
        endpoint = Endpoint(server.url, "small", attempts=3, **QUICK)
        answers = [endpoint.generate([WHO], decoding or Decoding(4))[0] for _ in range(2)]
    return answers, endpoint, server


# ---- failures that may pass


@pytest.mark.parametrize(
    "broken",
    [
        Reply(broken="drop"),
        Reply("Ada", broken="cut"),
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b'{"error": {"message": "Provider returned error", "code": 429}}'),
        Reply(body=b'{"error": {"message": "overloaded", "code": 502}, "user": "u"}'),
        Reply(body=b'{"error": "try again"}'),
        Reply(
            body=b'{"choices": [{"error": {"code": 429}, "finish_reason": "error", "text": ""}]}'
        ),
    ],
    ids=lambda reply: reply.broken or str(reply.body),
)
def test_a_failure_that_may_pass_is_tried_again_whatever_its_form(broken: Reply) -> None:
    answers, _, server = ask(failing(Reply("Bob"), broken, Reply("Ada")))
    assert answers == ["Bob", "Ada"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("code", "reason"), [(400, "the server says 400: no"), (404, "the server says 404: no")]
)
def test_a_failure_in_a_200_that_will_not_pass_is_asked_once(code: int, reason: str) -> None:
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    answers, _, server = ask(failing(Reply(body=body)))
    assert answers == [NoAnswer(reason)] * 2
    assert len(server.asked) == 2


def test_a_connection_that_is_always_dropped_gives_no_answer_with_its_reason() -> None:
    answers, _, server = ask(failing(Reply(broken="drop")))
    assert all("the connection failed" in one.reason for one in answers)
    assert all(one.reason.endswith(", 3 attempts") for one in answers)
    assert len(server.asked) == 6


def test_the_key_is_not_repeated_from_a_failure_in_a_200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_API_KEY", "sesame")
    body = b'{"error": {"message": "bad key sesame", "code": 400}}'
    choice = b'{"choices": [{"error": {"message": "bad key sesame", "code": 400}, "text": ""}]}'
    for content in (body, choice):
        answers, _, _ = ask(failing(Reply(body=content)))
        assert answers[0] == NoAnswer("the server says 400: bad key [key]")


def test_a_wait_is_a_number_a_date_or_milliseconds() -> None:
    assert wanted_wait({"retry-after": "1.5"}) == 1.5
    assert wanted_wait({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    later = formatdate(time.time() + 40, usegmt=True)
    assert 37 < wanted_wait({"retry-after": later}) <= 40
    assert wanted_wait({"retry-after": formatdate(time.time() - 40, usegmt=True)}) == 0
    assert wanted_wait({"retry-after": "soon"}) == 0
    assert wanted_wait({}) == 0


# ---- options that a server refuses


def refuses(*options: str, status: int = 400) -> Callable[[Asked], Reply]:
    def reply(asked: Asked) -> Reply:
        for option in options:
            if option in asked.body:
                return error(f"Unsupported parameter: '{option}' is not supported.", status)
        return Reply("Ada z Bob")

    return reply


SAMPLED = Decoding(4, ("z",), temperature=0.5, top_p=0.9, seed=3)


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("option", ["temperature", "top_p", "seed", "stop"])
def test_an_option_that_a_server_refuses_is_left_out_and_noted(option: str, status: int) -> None:
    answers, endpoint, server = ask(refuses(option, status=status), SAMPLED)
    assert answers == ["Ada", "Ada"]  # a stop text cuts here, too
    assert len(server.asked) == 3  # it is learned once
    others = {"temperature", "top_p", "seed", "stop", "max_tokens"} - {option}
    assert others <= server.asked[-1].body.keys()
    (note,) = endpoint.notes
    assert f"refuses the option '{option}'" in note


def test_several_options_may_be_refused() -> None:
    answers, endpoint, server = ask(refuses("temperature", "max_tokens", "seed"), SAMPLED)
    assert answers == ["Ada", "Ada"]
    assert len(server.asked) == 5
    assert server.asked[-1].body["max_completion_tokens"] == 4
    assert len(endpoint.notes) == 2  # the limit has only another name


def test_a_complaint_about_something_else_drops_nothing() -> None:
    answers, endpoint, server = ask(lambda _: error("the temperature of your question is too high"))
    assert (
        answers
        == [NoAnswer("the server says 400: the temperature of your question is too high")] * 2
    )
    assert endpoint.notes == []
    assert "temperature" in server.asked[2].body


# ---- models that think


def thinks(content: str | None, finish: str = "stop", **more: str) -> Reply:
    return Reply(message={"role": "assistant", "content": content, **more}, finish=finish)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_of_their_own_field_are_read_like_thoughts_in_the_text(field: str) -> None:
    answers, _, _ = ask(failing(thinks("I cannot.", **{field: "I recall: Ada."})))
    inside, _, _ = ask(failing(thinks("<think>\nI recall: Ada.\n</think>\n\nI cannot.")))
    assert answers == inside == ["<think>\nI recall: Ada.\n</think>\n\nI cannot."] * 2


@pytest.mark.parametrize(
    "cut",
    [
        thinks("<think>\nOkay, let me", "length"),
        thinks("  <think>", "stop"),
        thinks(None, "length", reasoning_content="Okay, Ada"),
        thinks("", "length", reasoning="Okay, Ada"),
        thinks("\n", "stop", reasoning="Okay, Ada"),
        thinks("", "length"),
        thinks(None, "length"),
    ],
)
def test_a_cut_thought_is_no_answer_and_gets_room_once(cut: Reply) -> None:
    def reply(asked: Asked) -> Reply:
        return thinks("Ada") if asked.body["max_tokens"] == 4 + ROOM_TO_THINK else cut

    answers, endpoint, server = ask(reply)
    assert answers == ["Ada", "Ada"]
    assert len(server.asked) == 3
    (note,) = endpoint.notes
    assert "thinks before it answers" in note
    answers, _, server = ask(failing(cut))
    assert all(isinstance(one, NoAnswer) for one in answers)
    assert len(server.asked) == 3


def test_a_stop_text_cuts_the_answer_and_not_the_thought() -> None:
    reply = failing(thinks("<think>\nz then a</think>Ada z Bob"))
    answers, _, _ = ask(reply, Decoding(4, ("z",)))
    assert answers[0] == "<think>\nz then a</think>Ada"


class Cutting(BlackBox):
    """A local system that is cut off in its thoughts."""

    name, fingerprint = "cutting", "cutting"

    def generate(self, prompts: Any, decoding: Decoding) -> list[str | NoAnswer]:
        return ["<think>\nLet me see" for _ in prompts]


def test_a_cut_thought_is_no_answer_of_any_system_nor_of_the_cache(tmp_path: Any) -> None:
    cache, request = Cache(tmp_path), Generate(WHO)
    for _ in range(2):
        found = measure(Cutting(), [request], cache=cache)
        assert found[request] == NoAnswer("it was cut off while it was thinking")
        assert found.report.unanswered == 1
    cache.write("cutting", {request: "<think>\nfrom an earlier version"})
    assert isinstance(measure(Cutting(), [request], cache=Cache(tmp_path))[request], NoAnswer)
