"""A server that misbehaves: the client gets one error in OpenAI's form, or a stream that ends so.

And clients that leave, time that runs out, and the end of the process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway_at_work import (
    HELLO,
    STREAM,
    Puppet,
    Upstream,
    Watched,
    answer,
    before,
    said,
    whole,
    working,
)

from delible.gateway.models import ServedModel
from delible.gateway.settings import GatewaySettings
from delible.system.replies import Piece, Unanswered
from delible.systems.endpoint import Endpoint

DONE = b"data: [DONE]\n\n"
MEGABYTES = 10 * 2**20
HURRIED: dict[str, Any] = {"first_token_seconds": 0.3, "idle_seconds": 0.3, "total_seconds": 5.0}

#: What a server does, the status of a whole answer, and of a stream that has not begun.
FAULTS: dict[str, tuple[Sequence[bytes | float | str], int]] = {
    "drops": ([], 502),
    "refuses the key": ([whole({"error": {"message": "key"}}, 401)], 502),
    "refuses the question": ([whole({"error": {"message": "no"}}, 400)], 400),
    "fails": ([whole(b"oops", 500)], 502),
    "is not there yet": ([whole(b"loading", 503)], 503),
    "moved": ([whole(b"", 301, location="http://elsewhere/")], 502),
    "dies in its head": ([b"HTTP/1.1 200 OK\r\ncontent-le"], 502),
    "dies in its body": ([b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"], 502),
    "is no HTTP": ([b"hello?\r\n\r\n"], 502),
    "is not JSON": ([whole(b"<html>")], 502),
    "is not UTF-8": ([whole(b'{"choices": [{"message": {"content": "\xff"}}')], 502),
    "has no choices": ([whole({"choices": []})], 502),
    "has a choice without a message": ([whole({"choices": [{}]})], 502),
    "fails with status 200": ([whole({"error": {"message": "quota"}})], 502),
    "says too much": ([whole(answer("x" * MEGABYTES))], 502),
    "says too much in an event": (
        [STREAM, said("x" * MEGABYTES), said(finish_reason="stop"), DONE],
        502,
    ),
    "sends half an event": ([STREAM, b'data: {"choices": [{"del'], 502),
    "sends an event that is no JSON": ([STREAM, b"data: oops\n\n", DONE], 502),
    "sends an event that is not UTF-8": ([STREAM, b"data: \xff\xfe\n\n", DONE], 502),
    "sends an error": ([STREAM, b'data: {"error": {"message": "no"}}\n\n', DONE], 502),
    "sends nothing": ([STREAM], 502),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_before_the_first_text(fault: str) -> None:
    sent, status = FAULTS[fault]
    with before(lambda _: sent) as (at_work, _):
        for streamed in (False, True):
            reply = at_work.chat(stream=streamed)
            assert reply.status_code == status, (streamed, reply.text[:300])
            assert reply.headers["content-type"].startswith("application/json")
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert at_work.client.get("/health").is_success


@pytest.mark.parametrize(
    "rest",
    [
        [], [b'data: {"choices": [{"del'], [b"data: \xff\n\n"], [b"data: oops\n\n"],
        [b'data: {"error": {"message": "no"}}\n\n', DONE], [b'data: {"choices": 7}\n\n'],
        [said("x" * MEGABYTES), said(finish_reason="stop"), DONE],
    ],
    ids=["dies", "half an event", "bytes", "no JSON", "an error", "no choices", "too much"],
)  # fmt: skip
def test_faults_amid_a_stream(rest: list[bytes]) -> None:
    with before(lambda _: [STREAM, said("Hel"), 0.05, *rest]) as (at_work, _):
        events = at_work.events()
    assert "[DONE]" not in events
    assert [event["choices"][0]["delta"].get("content") for event in events[:-1]] == ["", "Hel"]
    assert set(events[-1]) == {"error"}
    assert events[-1]["error"]["type"] == "server_error"


def test_a_limit_is_passed_on_with_its_wait() -> None:
    limit = whole({"error": {"message": "slow down"}}, 429, retry_after="7")
    with before(lambda _: [limit]) as (at_work, upstream):
        for streamed in (False, True):
            reply = at_work.chat(stream=streamed)
            assert reply.status_code == 429
            assert reply.headers["retry-after"] == "7"
            assert "slow down" in reply.json()["error"]["message"]
        assert len(upstream.asked) == 2  # clients try again themselves


def test_one_clients_mistake_changes_nothing_for_others() -> None:
    complaint = whole({"error": {"message": "max_tokens is too large"}}, 400)

    def sent(body: dict[str, Any]) -> list[bytes]:
        return [complaint if body.get("max_tokens") == 30_000 else whole(answer())]

    with before(sent) as (at_work, upstream):
        assert at_work.chat(max_tokens=30_000).status_code == 400
        assert at_work.chat(max_tokens=5).is_success
        assert upstream.asked[-1]["max_tokens"] == 5


def test_thoughts_come_as_a_part_of_the_answer() -> None:
    thoughts = {"reasoning_content": "Let me see."}
    events = [STREAM, said(delta=thoughts), said("Yes."), said(finish_reason="stop"), DONE]
    with before(
        lambda body: events if body.get("stream") else [whole(answer("Yes.", **thoughts))]
    ) as (at_work, _):
        text = at_work.chat().json()["choices"][0]["message"]["content"]
        assert text == "<think>\nLet me see.\n</think>\n\nYes."
        streamed = [one["choices"][0]["delta"].get("content", "") for one in at_work.events()[:-1]]
        assert "".join(streamed) == text


@pytest.mark.parametrize("sent", [["hang"], [STREAM, "hang"], [whole(answer())[:-5], "hang"]])
def test_a_server_that_hangs_is_left(sent: list[Any]) -> None:
    with before(lambda _: sent, **{**HURRIED, "total_seconds": 0.4}) as (at_work, upstream):
        for streamed in (False, True):
            upstream.left.clear()
            reply = at_work.chat(stream=streamed)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            assert upstream.left.wait(5)


def test_a_stream_that_stalls_is_left() -> None:
    with before(lambda _: [STREAM, said("Hel"), "hang"], **HURRIED) as (at_work, upstream):
        began = time.monotonic()
        events = at_work.events()
        assert time.monotonic() - began < 3  # neither of the whole answer's time nor the server's
        assert at_work.client.post("/v1/check", json={"prompt": "Hi"}).status_code == 501
        assert events[-1]["error"]["code"] == "timeout"
        assert "more text" in events[-1]["error"]["message"]
        assert upstream.left.wait(5)


def test_nobody_listens_there() -> None:
    upstream = Upstream(lambda _: [])
    upstream.close()
    with working(Endpoint(upstream.url, "up")) as at_work:
        assert at_work.chat().status_code == 502
        assert at_work.client.get("/ready").status_code == 503
        assert at_work.client.get("/health").status_code == 200
    with before(lambda _: [whole({"data": []})]) as (at_work, _):
        assert at_work.client.get("/ready").status_code == 200


def leaving(url: str, body: dict[str, Any], until: bytes = b"") -> None:
    """Asks, reads until some bytes came, and hangs up."""
    timeout = httpx2.Timeout(10, read=10 if until else 0.2)
    with (
        httpx2.Client(timeout=timeout, trust_env=False) as client,
        client.stream("POST", f"{url}/chat/completions", json=body) as reply,
    ):
        seen = b""
        for chunk in reply.iter_bytes():
            seen += chunk
            if until in seen:
                return


ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_before_the_first_text_ends_the_work(streamed: bool) -> None:
    puppet = Puppet([60.0, Piece("Hi", "stop")])
    with working(puppet) as at_work:
        with pytest.raises(httpx2.ReadTimeout):
            leaving(at_work.url, {**ASKED, "stream": streamed})
        assert puppet.let_go.wait(5)
    with before(lambda _: ["hang"]) as (at_work, upstream):
        with pytest.raises(httpx2.ReadTimeout):
            leaving(at_work.url, {**ASKED, "stream": streamed})
        assert upstream.left.wait(5)


def test_who_leaves_amid_a_stream_ends_the_work() -> None:
    with before(lambda _: [STREAM, said("Hel"), "hang"]) as (at_work, upstream):
        leaving(at_work.url, {**ASKED, "stream": True}, until=b"Hel")
        assert upstream.left.wait(5)
        until = time.monotonic() + 5
        while "delible_clients_left_total 1.0" not in at_work.client.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_of_several_answers_one_that_fails_ends_all() -> None:
    def lines(prompt: Any) -> list[Any]:
        return [Piece("Hi"), 60.0] if len(puppet.asked) == 1 else [0.1, Unanswered("no more.")]

    puppet = Puppet(lines)
    with working(puppet) as at_work:
        events = at_work.events(n=2)
        assert set(events[-1]) == {"error"}
        assert puppet.let_go.wait(5)
        puppet.asked.clear()
        puppet.let_go.clear()
        assert at_work.chat(n=2).status_code == 502
        assert puppet.let_go.wait(5)


def test_comments_keep_a_stream_alive_while_text_is_held() -> None:
    lines = [Piece(""), 0.25, *HELLO]
    with working(Puppet(lines), keep_alive_seconds=0.1) as at_work:
        events = at_work.events()
        assert events.count(": keep-alive") == 2
        assert events[-1] == "[DONE]"
        roles = [one["choices"][0]["delta"].get("role") for one in events if isinstance(one, dict)]
        assert roles == ["assistant", None, None, None]
    steady = [line for _ in range(8) for line in (0.1, Piece("Hi"))]
    with working(Puppet([*steady, *HELLO]), keep_alive_seconds=0.5) as at_work:
        assert ": keep-alive" not in at_work.events()
    failing = [0.25, Unanswered("the guard failed.", status=503)]
    with working(Puppet(failing), keep_alive_seconds=0.1) as at_work:
        events = at_work.events()
        assert events[-1]["error"]["code"] == "unavailable"
        assert "[DONE]" not in events
    with working(Puppet(failing)) as at_work:
        assert at_work.chat(stream=True).status_code == 503


def test_held_text_is_no_silence() -> None:
    """A system behind a guard is not slow; one that holds text may say so in empty pieces."""
    held = [0.2, Piece(""), 0.2, Piece(""), 0.2, *HELLO]
    with working(Puppet(held), **HURRIED) as at_work:
        assert at_work.events()[-1] == "[DONE]"
    with working(Watched([0.5, *HELLO]), **HURRIED) as at_work:
        assert at_work.events()[-1] == "[DONE]"
    with working(Puppet([0.5, *HELLO]), **HURRIED) as at_work:
        assert at_work.chat(stream=True).status_code == 504


def test_a_server_behind_a_gateway_is_asked_once_by_many_at_once() -> None:
    settings = GatewaySettings(concurrency=77, connect_seconds=3)
    endpoint = Endpoint("http://127.0.0.1:9/v1", "up")
    model = ServedModel("m", endpoint, settings)
    assert model.answers is endpoint
    server = endpoint.server
    assert (server.concurrency, server.attempts) == (77, 1)
    assert server.connect_seconds == pytest.approx(3)


@pytest.mark.slow
def test_a_server_told_to_end_finishes_its_streams(tmp_path: Path) -> None:
    """In a process of its own, told by a signal."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from gateway_at_work import Piece, Puppet\n"
        "from delible.gateway.models import ServedModel\n"
        "from delible.gateway.running import run\n"
        "from delible.gateway.settings import GatewaySettings\n"
        "settings = GatewaySettings(port=0)\n"
        "lines = [Piece('Hel'), 0.6, Piece('lo.', 'stop')]\n"
        "model = ServedModel('m', Puppet(lines), settings)\n"
        "run([model], settings, lambda url: print(url, flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        found: list[str] = []
        begun = threading.Event()

        def ask() -> None:
            with (
                httpx2.Client(timeout=20, trust_env=False) as client,
                client.stream(
                    "POST", f"{url}/chat/completions", json={**ASKED, "stream": True}
                ) as reply,
            ):
                for line in reply.iter_lines():
                    found.append(line)
                    if "Hel" in line:
                        begun.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(15)
        process.send_signal(signal.SIGTERM)
        thread.join(10)
        data = [line.removeprefix("data: ") for line in found if line]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-3])["choices"][0]["delta"]["content"] == "lo."
        assert process.wait(10) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
