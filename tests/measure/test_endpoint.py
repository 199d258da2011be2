"""An endpoint as a system, on a server of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from completions_server import Asked, Reply, is_probe, serving

from delible.errors import MissingExtraError, ModelError
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.records import Message
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Score,
)
from delible.system.base import System
from delible.systems.endpoint import Endpoint
from delible.systems.opening import open_system

WHO = Prompt.ask("Who?", system="Be brief.")
QUICK: dict[str, Any] = {"backoff_seconds": 0.01, "timeout_seconds": 5.0}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("DELIBLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def echo(asked: Asked) -> Reply:
    if "prompt" in asked.body:
        return Reply(f"text after {asked.body['prompt']}")
    return Reply(f"answer to {asked.body['messages'][-1]['content']}")


def failing(*replies: Reply) -> Callable[[Asked], Reply]:
    """The replies one after the other, the last one for ever."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def test_an_endpoint_is_a_system_that_only_generates() -> None:
    with serving(echo) as server:
        endpoint = Endpoint(server.url, "small")
        assert isinstance(endpoint, System)
        assert endpoint.capabilities == {"generate", "tools", "images"}
        with pytest.raises(ModelError, match="cannot 'score'"):
            measure(endpoint, [Score(WHO, "Ada")])
        assert not server.asked


def test_what_is_sent() -> None:
    with serving(echo) as server:
        endpoint = Endpoint(server.url + "/", "small", prefill_body={"go_on": True})
        decoding = Decoding(7, ("\n", "Q:"), temperature=0.5, top_p=0.9, seed=3)
        assert endpoint.generate([WHO], decoding) == ["answer to Who?"]
        prefilled = Prompt(WHO.messages, prefill="Sure:\n")
        assert endpoint.generate([prefilled], Decoding(5)) == ["answer to Sure:"]
        assert endpoint.generate([Prompt(text="Once")], Decoding(5)) == ["text after Once"]
    chat, going_on, raw = server.asked
    assert (chat.path, raw.path) == ("/v1/chat/completions", "/v1/completions")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert chat.body == {
        "model": "small", "messages": turns, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
        "seed": 3, "stop": ["\n", "Q:"],
    }  # fmt: skip
    assert going_on.body == {
        "model": "small", "max_tokens": 5, "temperature": 0, "go_on": True,
        "messages": [*turns, {"role": "assistant", "content": "Sure:\n"}],
    }  # fmt: skip
    assert raw.body == {"model": "small", "prompt": "Once", "max_tokens": 5, "temperature": 0}
    assert chat.key == ""


def test_answers_are_cut_and_trimmed_as_those_of_a_model() -> None:
    stops = tuple("vwxyz")
    with serving(failing(Reply(" Ada z Bob\n"), Reply("Sure:\nAda"), Reply(""))) as server:
        endpoint = Endpoint(server.url, "small")
        assert endpoint.generate([WHO], Decoding(9, stops)) == ["Ada"]
        assert server.asked[0].body["stop"] == list(stops[:4])
        prefilled = Prompt(WHO.messages, prefill="Sure:\n")
        assert endpoint.generate([prefilled], Decoding(9)) == ["Ada"]
        assert endpoint.generate([WHO], Decoding(9)) == [""]


def test_many_answers_come_in_order_and_not_too_many_at_once() -> None:
    full = threading.Barrier(3, timeout=10)

    def slow(asked: Asked) -> Reply:
        full.wait()  # breaks unless three are under way
        return echo(asked)

    with serving(slow) as server:
        endpoint = Endpoint(server.url, "small", concurrency=3, **QUICK)
        prompts = [Prompt.ask(str(number)) for number in range(12)]
        answers = endpoint.generate(prompts, Decoding(4))
    assert answers == [f"answer to {number}" for number in range(12)]
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with serving(failing(Reply(status=status, body=b"busy"), Reply("Ada"))) as server:
        endpoint = Endpoint(server.url, "small", **QUICK)
        assert endpoint.generate([WHO], Decoding(4)) == ["Ada"]
        assert len(server.asked) == 2


def test_the_server_says_how_long_to_wait() -> None:
    busy = Reply(status=429, body=b"", headers={"Retry-After": "0.4"})
    with serving(failing(busy, Reply("Ada"))) as server:
        endpoint = Endpoint(server.url, "small", **QUICK)
        began = time.perf_counter()
        assert endpoint.generate([WHO], Decoding(4)) == ["Ada"]
        assert time.perf_counter() - began >= 0.4


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def pass_by(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("delible.systems.calls.sleep", pass_by)
    with serving(failing(Reply(status=500, body=b""))) as server:
        Endpoint(server.url, "small", attempts=5, backoff_seconds=2.0).generate([WHO], Decoding(4))
        assert len(server.asked) == 5
    for number, wait in enumerate(waits):
        assert 0.75 * 2 ** (number + 1) <= wait <= 1.25 * 2 ** (number + 1)
    assert len(waits) == 4


def test_a_server_that_never_recovers_gives_no_answer() -> None:
    broken = Reply(status=500, body=b'{"error": {"message": "out of memory"}}')
    with serving(failing(broken)) as server:
        endpoint = Endpoint(server.url, "small", attempts=3, **QUICK)
        found = measure(endpoint, [Generate(WHO, Decoding(4))])
        (answer,) = found.values()
        assert isinstance(answer, NoAnswer)
        assert answer.reason == "the server says 500: out of memory, 3 attempts"
        assert found.report.unanswered == 1
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(body=b"<html>Sign in"), "the reply is not JSON: <html>Sign in"),
        (Reply(body=b"[1]"), "the reply is not a completion"),
        (Reply(body=b'{"choices": []}'), "the reply is not a completion"),
        (Reply(body=b'{"choices": [null]}'), "the reply is not a completion"),
        (Reply(None), "the reply has no text (finish reason 'stop')"),
        (Reply("", finish="content_filter"), "the server's filter withheld the answer"),
        (
            Reply(status=429, body=b'{"error": {"message": "no", "code": "insufficient_quota"}}'),
            "the server says 429: no",
        ),
        (Reply(status=400, body=b'{"error": "too long"}'), "the server says 400: too long"),
        (Reply(status=404, body=b"<html>"), "the server says 404: <html>"),
    ],
)
def test_what_will_not_pass_is_asked_once_and_is_no_answer(reply: Reply, reason: str) -> None:
    with serving(lambda asked: reply) as server:
        (answer,) = Endpoint(server.url, "small", **QUICK).generate([WHO], Decoding(4))
        assert answer == NoAnswer(reason)
        assert len(server.asked) == 1


def test_a_slow_answer_is_given_up_and_tried_again() -> None:
    release = threading.Event()

    def slow(asked: Asked) -> Reply:
        release.wait(10)
        return Reply("too late")

    with serving(slow) as server:
        endpoint = Endpoint(
            server.url, "small", timeout_seconds=0.15, attempts=2, backoff_seconds=0.01
        )
        (answer,) = endpoint.generate([WHO], Decoding(4))
        release.set()
        assert answer == NoAnswer("no answer within 0.15 seconds, 2 attempts")
        assert len(server.asked) == 2


def test_a_refusal_is_an_answer_and_parts_are_joined() -> None:
    def reply(message: dict[str, Any]) -> Reply:
        choice = {"message": message, "finish_reason": "stop"}
        return Reply(body=json.dumps({"choices": [choice]}).encode())

    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "da"}]
    replies = failing(reply({"content": None, "refusal": "I cannot."}), reply({"content": parts}))
    with serving(replies) as server:
        endpoint = Endpoint(server.url, "small")
        assert endpoint.generate([WHO], Decoding(4)) == ["I cannot."]
        assert endpoint.generate([WHO], Decoding(4)) == ["Ada"]


# ---- the key


def locked(asked: Asked) -> Reply:
    if asked.key != "Bearer sesame":
        told = {"error": {"message": f"Incorrect API key provided: {asked.key[7:]}."}}
        return Reply(status=401, body=json.dumps(told).encode())
    return echo(asked)


def test_the_key_comes_from_the_environment_and_is_never_repeated(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(locked) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "secret-wrong")
        with pytest.raises(ModelError, match=r"refuses the key in \$OPENAI_API_KEY") as error:
            open_system(server.url, model="small")
        assert "secret-wrong" not in str(error.value)
        assert "[key]" in str(error.value)
        (answer,) = Endpoint(server.url, "small").generate([WHO], Decoding(4))
        assert isinstance(answer, NoAnswer)
        assert "secret-wrong" not in answer.reason

        monkeypatch.setenv("DELIBLE_API_KEY", "sesame")
        endpoint = open_system(server.url, model="small")
        assert endpoint.generate([WHO], Decoding(4)) == ["answer to Who?"]
        assert "sesame" not in repr(endpoint) + endpoint.name + " ".join(caplog.messages)
        assert "$DELIBLE_API_KEY" in caplog.messages[0]

        monkeypatch.setenv("MY_KEY", "sesame")
        monkeypatch.delenv("DELIBLE_API_KEY")
        mine = Endpoint(server.url, "small", key_variable="MY_KEY")
        assert mine.generate([WHO], Decoding(4)) == ["answer to Who?"]
        with pytest.raises(ModelError, match="OTHER_KEY is not set"):
            Endpoint(server.url, "small", key_variable="OTHER_KEY")


def test_without_a_key_the_refusal_says_so() -> None:
    with (
        serving(locked) as server,
        pytest.raises(ModelError, match=r"refuses a request without a key.*\$DELIBLE_API_KEY"),
    ):
        Endpoint(server.url, "small").check()


# ---- before the run


def test_the_model_is_found_or_named() -> None:
    def knows_small(asked: Asked) -> Reply:
        if asked.body["model"] != "small":
            return Reply(status=404, body=b'{"error": {"message": "model not found"}}')
        return echo(asked)

    with serving(knows_small) as server:
        with pytest.raises(ModelError, match=r"name of the model is missing.*large, small"):
            open_system(server.url)
        with pytest.raises(ModelError, match=r"no model 'smal'.*Did you mean 'small'\?"):
            open_system(server.url, model="smal")
        assert open_system(f"{server.url}#small").name == f"small at {server.url}"
        server.models = ("small",)
        assert open_system(server.url).name == f"small at {server.url}"
        assert all(is_probe(one) for one in server.asked if one.method == "POST")


def test_newer_models_have_another_word_for_the_limit() -> None:
    def modern(asked: Asked) -> Reply:
        if "max_tokens" in asked.body:
            told = b'{"error": {"message": "Use \'max_completion_tokens\' instead."}}'
            return Reply(status=400, body=told)
        return echo(asked)

    with serving(modern) as server:
        endpoint = open_system(server.url, model="small")
        assert endpoint.generate([WHO], Decoding(4)) == ["answer to Who?"]
        assert server.asked[-1].body["max_completion_tokens"] == 4


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/v1", r"does not answer: the connection failed.*ends in /v1"),
        ("https://", "no address of a server"),
        ("http://name:word@host/v1", "would end in manifests"),
        ("http://host/v1?api_key=word", "would end in manifests"),
    ],
)
def test_wrong_addresses_are_told_before_the_run(url: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        open_system(url, model="small")
    assert "word" not in str(error.value).replace("password", "")


def test_an_address_without_an_api_is_told() -> None:
    moved = {"Location": "https://elsewhere/v1"}
    replies = failing(Reply(status=404, body=b"nothing here"), Reply(status=308, headers=moved))
    with serving(replies) as server:
        server.models = ()
        with pytest.raises(ModelError, match="nothing here"):
            Endpoint(server.url, "small").check()
        with pytest.raises(ModelError, match="moved to https://elsewhere/v1"):
            Endpoint(server.url, "small").check()


def test_a_whole_address_of_a_call_is_accepted() -> None:
    with serving(echo) as server:
        endpoint = Endpoint(f"{server.url}/chat/completions", "small")
        assert endpoint.url == server.url


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[endpoint\]'"):
        Endpoint("http://host/v1", "small")


# ---- the cache


def test_only_a_stable_endpoint_is_cached(tmp_path: Path) -> None:
    with serving(echo) as server:
        asked = [Generate(Prompt(messages=(Message(role="user", content="Who?"),)), Decoding(4))]
        for stable, calls in ((False, 2), (True, 1)):
            server.asked.clear()
            for _ in range(2):
                endpoint = Endpoint(server.url, "small", stable=stable)
                measure(endpoint, asked, cache=Cache(tmp_path / str(stable)))
            assert len(server.asked) == calls
        assert Endpoint(server.url, "small").fingerprint is None
        prints = {
            Endpoint(server.url, "small", stable=True).fingerprint,
            Endpoint(server.url, "large", stable=True).fingerprint,
            Endpoint(server.url, "small", stable=True, prefill_body={"a": 1}).fingerprint,
            Endpoint("http://host/v1", "small", stable=True).fingerprint,
        }
        assert len(prints) == 4
