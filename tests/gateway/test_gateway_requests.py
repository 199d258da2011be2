"""What clients may send, what is refused, and who may call: every failure in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway_at_work import HELLO, Puppet, Watched, Working, answer, before, whole, working
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from delible.errors import RecipeError
from delible.gateway.front import Front
from delible.gateway.keys import Allowance, Callers, hashed, new_key, read_keys
from delible.gateway.settings import GatewaySettings, read_settings
from delible.gateway.telling import Numbers
from delible.system.replies import Piece

PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
PICTURE = {"type": "image_url", "image_url": {"url": PIXEL}}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def at_work() -> Iterator[Working]:
    with working(Puppet(HELLO, "tools"), prompt_characters=50_000) as found:
        yield found


def refused(reply: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error of a reply, which has OpenAI's form."""
    assert reply.status_code == status, reply.text[:300]
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"].endswith("_error")
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"messages": [}', b"[" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"messages": "\\ud800"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    ],
    ids=range(12),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/check"])
def test_what_is_no_request_is_refused(at_work: Working, path: str, body: bytes) -> None:
    reply = at_work.client.post(path, content=body)
    assert reply.status_code in (400, 501)
    if path != "/v1/check" or reply.status_code == 400:
        refused(reply)
    assert at_work.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**7}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": "one"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_wrong_values_are_named(at_work: Working, more: dict[str, Any], param: str) -> None:
    assert (refused(at_work.chat(**more))["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, PICTURE]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
        {"messages": [{"role": "user", "content": "Hi", "reasoning_content": "Ada"}]},
        {"prediction": {"type": "content", "content": "Ada"}},
        {"documents": [{"text": "Ada"}]},
        {"functions": [{"name": "a"}]},
        {"new_option": "a text with blanks"},
        {"new_option": {"deep": ["x" * 65]}},
        {"prompt_token_ids": [1, 2]},
        {"new_option": list(range(17))},
    ],
)
@pytest.mark.parametrize("upstream", [False, True])
def test_what_nobody_inspects_is_refused(
    at_work: Working, more: dict[str, Any], upstream: bool
) -> None:
    if not upstream:
        assert refused(at_work.chat(**more))["code"] == "content_not_inspected"
        return
    with before(lambda _: [whole(answer())]) as (guarded, server):
        assert refused(guarded.chat(**more))["code"] == "content_not_inspected"
        assert server.asked == []


def test_harmless_options_are_told_or_pass(at_work: Working) -> None:
    reply = at_work.chat(logit_bias={"5": 1}, user="Ada Brook", metadata={"why": "a b"})
    assert reply.status_code == 200
    warning = reply.headers["x-delible-warning"]
    assert warning == "the option 'logit_bias' is not known here and was left out"
    assert "x-delible-warning" not in at_work.chat(presence_penalty=0, store=False).headers
    strange = at_work.chat(**{"ø\n": 1}).headers["x-delible-warning"]
    assert "\\xf8" in strange
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]
    assert at_work.chat(parts).status_code == 200


def test_long_texts_and_bodies_are_refused(at_work: Working) -> None:
    error = refused(at_work.chat("a " * 500_000))
    assert error["code"] == "context_length_exceeded"
    reply = at_work.client.post("/v1/completions", json={"prompt": "a" * 60_000})
    assert refused(reply)["code"] == "context_length_exceeded"
    with working(Puppet(), body_bytes=1024) as small:
        assert refused(small.chat("a" * 2000), 413)["code"] == "body_too_large"


def test_unknown_paths_methods_and_models(at_work: Working) -> None:
    for path in ("/v1/embeddings", "/", "/docs", "/admin/targets", "/v1/chat/completions/"):
        assert refused(at_work.client.post(path, json={}), 404)["code"] == "not_found"
    refused(at_work.client.get(CHAT), 405)
    assert refused(at_work.chat(model="other"), 404)["code"] == "model_not_found"
    refused(at_work.client.get("/v1/models/other"), 404)
    assert at_work.client.post(
        CHAT, json={"messages": [{"role": "user", "content": "Hi"}]}
    ).is_success


def test_responses_are_texts_without_a_state(at_work: Working) -> None:
    def ask(**body: Any) -> httpx2.Response:
        return at_work.client.post("/v1/responses", json={"input": "Hi", **body})

    assert ask().json()["store"] is False
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    ]
    assert ask(input=turns).is_success
    for more in (
        {"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]},
        {"background": True}, {"conversation": "c"},
        {"input": [{"type": "input_image", "image_url": PIXEL}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}]},
        {"input": [{"role": "user"}]}, {"input": []}, {"text": {"format": {"type": "poem"}}},
    ):  # fmt: skip
        refused(ask(**more))


def test_a_request_keeps_its_number(at_work: Working) -> None:
    reply = at_work.chat(headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    made = {at_work.chat(headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in "ab"}
    assert len(made) == 2
    assert all(one.startswith("req_") for one in made)


def test_a_withheld_answer_looks_like_any_other() -> None:
    puppet = Puppet([Piece("I cannot say."), Piece("", "content_filter", withheld_by="names")])
    with working(puppet, name_policy=True) as at_work:
        reply = at_work.chat()
        choice = reply.json()["choices"][0]
        assert (reply.status_code, choice["finish_reason"]) == (200, "content_filter")
        assert choice["message"]["content"] == "I cannot say."
        assert reply.headers["x-delible-policy"] == "names"
        assert at_work.events()[-2]["choices"][0]["finish_reason"] == "content_filter"
        response = at_work.client.post("/v1/responses", json={"input": "Hi"}).json()
        assert response["incomplete_details"] == {"reason": "content_filter"}
        numbers = at_work.client.get("/metrics").text
        assert 'delible_verdicts_total{guard="names",verdict="withheld"} 3.0' in numbers
    nameless = Watched([Piece("I cannot say.", "content_filter")])
    with working(nameless, name_policy=True) as at_work:
        assert at_work.chat().headers["x-delible-policy"] == "names"
        assert at_work.chat(stream=True).headers["x-delible-policy"] == "names"
    with working(nameless) as at_work:
        assert "x-delible-policy" not in at_work.chat().headers
    with working(puppet, name_policy=True, undisclosed=True) as at_work:
        reply = at_work.chat()
        assert reply.json()["choices"][0]["finish_reason"] == "stop"
        assert "x-delible-policy" not in reply.headers
        assert at_work.events()[-2]["choices"][0]["finish_reason"] == "stop"
        response = at_work.client.post("/v1/responses", json={"input": "Hi"}).json()
        assert (response["status"], response["incomplete_details"]) == ("completed", None)


def test_verdicts_without_answers(at_work: Working) -> None:
    reply = at_work.client.post("/v1/check", json={"prompt": "Hi"})
    assert refused(reply, 501)["code"] == "no_guard"
    watched = Watched()
    with working(watched) as guarded:

        def check(**body: Any) -> httpx2.Response:
            return guarded.client.post("/v1/check", json=body)

        assert check(prompt="Who is Ada Brook?").json()["allowed"] is False
        turns = [{"role": "user", "content": "Who?"}]
        found = check(messages=turns, answer="Ada Brook.").json()
        assert (found["allowed"], found["guard"]) == (False, "names")
        assert check(messages=turns).json()["allowed"] is True
        assert check(prompt="rewrite this").json()["allowed"] is True
        assert refused(check(prompt="broken"), 503)["code"] == "unavailable"
        refused(check())
        refused(check(messages=turns, prompt="Who?"))
        refused(check(messages=[{"role": "user", "content": [PICTURE]}]))
        numbers = guarded.client.get("/metrics").text
        assert 'delible_verdicts_total{guard="names",verdict="refused"} 2.0' in numbers
        assert "Ada" not in numbers
    assert watched.asked == []


def test_targets_change_by_the_admins_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN", "secret")
    with working(Watched(), admin_key_variable="ADMIN") as at_work:

        def change(key: str, **body: Any) -> httpx2.Response:
            headers = {"authorization": f"Bearer {key}"}
            return at_work.client.post("/admin/targets", json=body, headers=headers)

        refused(change("wrong", add=["Bo Reed"]), 401)
        assert change("secret", add=["Bo Reed"]).json()["count"] == 2
        body = {"prompt": "Bo Reed?"}
        assert at_work.client.post("/v1/check", json=body).json()["allowed"] is False
        assert change("secret", remove=["Bo Reed", "Ada Brook"]).json()["count"] == 0
        assert at_work.client.post("/v1/check", json=body).json()["allowed"] is True
        refused(change("secret", names=["Bo Reed"]))
    with working(Puppet(), admin_key_variable="ADMIN") as at_work:
        headers = {"authorization": "Bearer secret"}
        refused(at_work.client.post("/admin/targets", json={}, headers=headers), 501)
    monkeypatch.delenv("ADMIN")
    with (
        pytest.raises(RecipeError, match="ADMIN is not set"),
        working(Puppet(), admin_key_variable="ADMIN"),
    ):
        pass


def test_keys_and_their_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    ada, bo = new_key("ada", path), new_key("bo", path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ada not in path.read_text()
    assert [one.sha256 for one in read_keys(path)] == [hashed(ada), hashed(bo)]
    with pytest.raises(RecipeError, match="there is a key 'ada' already"):
        new_key("ada", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["requests_per_minute"] = 2
    lines[1]["tokens_per_minute"] = 10
    path.write_text("\n".join(map(json.dumps, lines)))
    with working(Puppet(), keys=path) as at_work:

        def ask(key: str) -> httpx2.Response:
            return at_work.chat(headers={"authorization": f"Bearer {key}"})

        refused(at_work.chat(), 401)
        refused(ask("dlb-unknown"), 401)
        refused(at_work.client.get("/v1/models"), 401)
        assert at_work.client.get("/health").is_success
        assert [ask(ada).status_code for _ in range(3)] == [200, 200, 429]
        limited = ask(ada)
        assert refused(limited, 429)["type"] == "rate_limit_error"
        assert 1 <= int(limited.headers["retry-after"]) <= 60
        # 9 tokens each: one and a half answers fit, so the second exceeds and the third waits
        assert [ask(bo).status_code for _ in range(3)] == [200, 200, 429]
    path.write_text('{"name": "ada"}\n')
    with pytest.raises(RecipeError, match="this is no key"):
        read_keys(path)


def test_calls_at_once_are_limited() -> None:
    puppet = Puppet([0.3, Piece("Hi", "stop")])
    with working(puppet, calls_at_once=2) as at_work:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(at_work.chat().status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [200, 200, 429, 429]
        assert at_work.chat().status_code == 200


def test_a_client_may_call_again_as_soon_as_its_answer_is_whole() -> None:
    settings = GatewaySettings(calls_at_once=1)
    statuses: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("Hi")(scope, receive, send)

    front = Front(app, settings, Numbers(), Callers(settings))

    async def call(again: bool) -> None:
        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif again and not message.get("more_body"):
                await call(again=False)  # this client is quicker than the end of its first call

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await front(scope, nothing, heard)

    async def nothing() -> Message:
        return {"type": "http.request"}

    asyncio.run(call(again=True))
    asyncio.run(call(again=False))
    assert statuses == [200, 200, 200]


def test_what_a_minute_allows_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("delible.gateway.keys.time.monotonic", lambda: now[0])
    allowance = Allowance(60)
    allowance.use(90)
    assert allowance.wait(1) == pytest.approx(31)
    now[0] = 31.0
    assert allowance.wait(1) == pytest.approx(0)
    now[0] = 1000.0
    assert allowance.wait(60) == pytest.approx(0)
    assert allowance.wait(61) == pytest.approx(1)


def test_web_pages_may_call_only_where_they_are_allowed(at_work: Working) -> None:
    page = {"origin": "https://here", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in at_work.chat(headers=page).headers
    with working(Puppet(), allowed_origins=("https://here",)) as allowing:
        asked = allowing.client.options(CHAT, headers=page)
        assert asked.headers["access-control-allow-origin"] == "https://here"
        other = allowing.client.options(CHAT, headers={**page, "origin": "https://there"})
        assert "access-control-allow-origin" not in other.headers


def test_logs_tell_of_calls_and_of_no_content(caplog: pytest.LogCaptureFixture) -> None:
    puppet = Puppet([Piece("A secret answer."), RuntimeError("A secret failure.")])
    with working(puppet) as at_work:
        at_work.chat("A secret question.", headers={"x-request-id": "r1"}, secret_option=1)
        puppet.lines = [Piece("A secret answer.", "stop")]
        at_work.chat("A secret question.", headers={"x-request-id": "r2"})
    assert "secret" not in caplog.text.lower()
    lines = [json.loads(one) for one in caplog.messages if one.startswith("{")]
    first, second = (next(one for one in lines if one["request"] == name) for name in ("r1", "r2"))
    assert (first["status"], first["failed"]) == (500, "internal_error")
    assert (second["status"], second["finishes"], second["model"]) == (200, ["stop"], "m")


def test_settings_come_from_a_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("port: 9000\nidle_seconds: 5\nallowed_origins: [https://here]\n")
    found = read_settings(path, {"port": 9001, "host": None})
    assert (found.port, found.idle_seconds) == (9001, pytest.approx(5))
    assert found.host == GatewaySettings().host
    path.write_text("prot: 9000\n")
    with pytest.raises(RecipeError, match="Did you mean 'port'"):
        read_settings(path, {})
    path.write_text("- port\n")
    with pytest.raises(RecipeError, match="holds no names"):
        read_settings(path, {})
