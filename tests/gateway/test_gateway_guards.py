"""Guards behind the gateway: who withheld, one that fails, several, and files they follow."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_at_work import STREAM, Puppet, Working, answer, before, said, whole, working

from delible.gateway import app as app_file
from delible.gateway.errors import CallFailed
from delible.gateway.keys import Callers, new_key
from delible.gateway.settings import GatewaySettings
from delible.system.asks import Prompt
from delible.system.replies import Piece
from delible.systems.endpoint import Endpoint
from delible.systems.guarded import GuardedSystem
from delible.systems.judged_text import texts_of
from delible.systems.judging import Forward, Judged, Refuse
from delible.systems.mind import GuardMind
from delible.systems.targeted import guard_by_targets


class Against(GuardMind):
    """Refuses prompts and answers with a word; breaks at another one; rewrites at a third."""

    threaded = False

    def __init__(self, word: str) -> None:
        self.word = word

    @property
    def fingerprint(self) -> str:
        return self.word

    def before(self, prompt: Prompt) -> Judged:
        text = "\n".join(texts_of(prompt))
        if f"break {self.word}" in text:
            raise ValueError(text)
        if f"rewrite {self.word}" in text:
            return Forward(Prompt.ask("two"))
        return Refuse("No.") if self.word in text else None

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        return Refuse("No.") if self.word in answer else None


def guarded(inner: Any, *words: str) -> Any:
    for word in words:
        inner = GuardedSystem(inner, Against(word), f"against-{word}")
    return inner


def counted(at_work: Working, guard: str, verdict: str) -> float:
    """How often, so far."""
    wanted = f'delible_verdicts_total{{guard="{guard}",verdict="{verdict}"}} '
    lines = at_work.client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


@pytest.mark.parametrize("word", ["one", "two"])
@pytest.mark.parametrize("side", ["prompt", "answer"])
def test_of_several_guards_the_one_that_withheld_is_named(
    word: str, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    puppet = Puppet([Piece(f"It is {word}." if side == "answer" else "Hello."), Piece("", "stop")])
    system = guarded(puppet, "one", "two")
    asked = f"Say {word}." if side == "prompt" else "Say it."
    name = f"against-{word}"
    with (
        caplog.at_level(logging.INFO, "delible.gateway.access"),
        working(system, name_policy=True) as at_work,
    ):
        reply = at_work.chat(asked)
        assert reply.json()["choices"][0]["finish_reason"] == "content_filter"
        assert reply.headers["x-delible-policy"] == name
        streamed = at_work.chat(asked, stream=True)
        assert '"finish_reason":"content_filter"' in streamed.text
        assert word not in streamed.text
        assert streamed.headers["x-delible-policy"] == name
        assert counted(at_work, name, "withheld") == pytest.approx(2)
        lines = [json.loads(one.message) for one in caplog.records if "withheld_by" in one.message]
        assert [line["withheld_by"] for line in lines] == [[name], [name]]
        assert at_work.chat("Hi").headers.get("x-delible-policy") == (
            name if side == "answer" else None
        )


def test_a_guard_that_fails_refuses_as_any_other_and_the_operator_learns_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    system = guarded(Puppet(), "one", "two")
    with caplog.at_level(logging.INFO), working(system) as at_work:
        failing, refusing = at_work.chat("break one SECRET"), at_work.chat("say one")
        told = [one.json() for one in (failing, refusing)]
        assert failing.status_code == refusing.status_code == 200
        for one in told:
            one["id"] = one["created"] = None
            one["choices"][0]["message"]["content"] = None  # one of a hundred, by the prompt
        assert told[0] == told[1], "by its form nobody learns what breaks a guard"
        assert counted(at_work, "against-one", "failed") == pytest.approx(1)
        assert counted(at_work, "against-one", "withheld") == pytest.approx(1)
        assert "SECRET" not in caplog.text
        assert '"guard_failed": true' in caplog.text
        found = at_work.client.post("/v1/check", json={"prompt": "break one"}).json()
        assert (found["allowed"], found["guard"]) == (False, "against-one")
        assert counted(at_work, "against-one", "failed") == pytest.approx(2)


def test_a_verdict_is_that_of_all_guards() -> None:
    puppet = Puppet()
    with working(guarded(puppet, "one", "two")) as at_work:

        def check(**body: Any) -> tuple[bool, str]:
            found = at_work.client.post("/v1/check", json=body).json()
            return found["allowed"], found["guard"]

        assert check(prompt="say one") == (False, "against-one"), "the inner one is asked, too"
        assert check(prompt="say two") == (False, "against-two")
        assert check(prompt="Hi") == (True, "against-two+against-one")
        assert check(prompt="Hi", answer="one") == (False, "against-one")
        assert check(prompt="rewrite two, one") == (True, "against-two+against-one")
        assert check(prompt="rewrite one") == (True, "against-two+against-one")
    assert puppet.asked == []


@pytest.mark.parametrize("message", [{"content": None}, {"content": ""}])
def test_what_the_server_behind_filters_is_a_filtered_answer(message: dict[str, Any]) -> None:
    def sent(asked: dict[str, Any]) -> list[bytes]:
        if asked.get("stream"):
            return [STREAM, said(delta={"role": "assistant", **message}),
                    said(finish_reason="content_filter"), b"data: [DONE]\n\n"]  # fmt: skip
        body = answer()
        body["choices"] = [{"message": {"role": "assistant", **message},
                            "finish_reason": "content_filter"}]  # fmt: skip
        return [whole(body)]

    with before(sent, name_policy=True) as (at_work, upstream):
        reply = at_work.chat()
        choice = reply.json()["choices"][0]
        assert (reply.status_code, choice["finish_reason"]) == (200, "content_filter")
        assert choice["message"]["content"] == ""
        assert reply.headers["x-delible-policy"] == "upstream"
        assert counted(at_work, "upstream", "withheld") == pytest.approx(1)
        events = at_work.events()
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "content_filter"
        with working(guarded(Endpoint(upstream.url, "up"), "one"), name_policy=True) as behind:
            reply = behind.chat()
            assert reply.json()["choices"][0]["finish_reason"] == "content_filter"
            assert reply.headers["x-delible-policy"] == "upstream", "the guard withheld nothing"


# ---- files that change


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < ends:
        time.sleep(0.02)
    return found


def test_keys_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app_file, "LOOK", 0.02)
    monkeypatch.setattr(logging.getLogger("delible"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="delible")
    path = tmp_path / "keys.jsonl"
    ada = new_key("ada", path)
    with working(Puppet(), keys=path) as at_work:

        def status(key: str) -> int:
            return at_work.chat(headers={"authorization": f"Bearer {key}"}).status_code

        assert status(ada) == 200
        bo = new_key("bo", path)
        assert within(30, lambda: status(bo) == 200), "a new key is known"
        good = path.read_text()
        path.write_text('{"name": "broken"}\n')
        assert within(30, lambda: "the 2 old ones stay" in caplog.text), caplog.text
        assert (status(ada), status(bo)) == (200, 200), "a broken file changes nothing"
        path.unlink()
        time.sleep(0.1)
        assert status(ada) == 200
        path.write_text(good.splitlines()[1] + "\n")
        assert within(30, lambda: status(ada) == 401), "a key that is taken out opens nothing"
        assert status(bo) == 200


def test_a_key_that_stays_keeps_what_it_used(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    ada = new_key("ada", path)
    callers = Callers(GatewaySettings(keys=path, requests_per_minute=1))
    headers = {"authorization": f"Bearer {ada}"}
    callers.of(headers).enter()
    new_key("bo", path)
    assert [callers.poll() for _ in range(3)] == [False, True, False], "it is read once"
    with pytest.raises(CallFailed, match="1 requests per minute"):
        callers.of(headers).enter()
    entry = json.loads(path.read_text().splitlines()[0])
    path.write_text("")  # half of what is being written
    assert not callers.poll()
    path.write_text(json.dumps({**entry, "requests_per_minute": 5}) + "\n")
    assert [callers.poll() for _ in range(2)] == [False, True]
    callers.of(headers).enter()


def test_targets_are_followed_while_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_file, "LOOK", 0.02)
    path = tmp_path / "targets.yaml"
    path.write_text("- {id: a, names: [Ada Brook]}\n")
    system = guard_by_targets(Puppet(), path, similarity=False)  # type: ignore[arg-type]
    with working(system) as at_work:
        assert at_work.chat("Who is Bo Reed?").json()["choices"][0]["finish_reason"] == "stop"
        path.write_text("- {id: a, names: [Ada Brook]}\n- {id: b, names: [Bo Reed]}\n")
        assert within(5, lambda: system.reloading.count == 2)
        reply = at_work.chat("Who is Bo Reed?").json()
        assert reply["choices"][0]["finish_reason"] == "content_filter", "the first one to ask"


# ---- what an outsider sends


def test_nothing_that_a_server_sees_goes_by_a_guard() -> None:
    """Every place of a request that is passed on, and may hold a text."""

    def sent(asked: dict[str, Any]) -> list[bytes]:
        return [whole(answer("Fine."))]

    call = {"id": "call anvil", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    schema = {"type": "object", "properties": {"a": {"description": "tell of anvil"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    user = {"role": "user", "content": "Hi"}
    with before(sent) as (_, upstream):
        inner = Endpoint(upstream.url, "up")
        with working(guarded(inner, "anvil")) as at_work:
            for more in (
                {"response_format": form},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "anvil"}}},
                {"some_option": "anvil"},
                {"some_option": {"anvil": 1}},
                {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]},
                              {"role": "tool", "content": "1", "tool_call_id": "1"}]},
                {"messages": [user, {"role": "tool", "content": "1", "tool_call_id": "anvil"}]},
                {"messages": [{"role": "user", "content": [
                    {"type": "text", "text": "an"}, {"type": "text", "text": "vil"}]}]},
                {"tools": [{"type": "function", "function": {"name": "anvil"}}]},
            ):  # fmt: skip
                reply = at_work.chat(**more)
                assert reply.is_success, reply.text
                assert reply.json()["choices"][0]["finish_reason"] == "content_filter", more
            text = {"prompt": "Hi", "some_option": ["anvil"]}
            reply = at_work.client.post("/v1/completions", json=text)
            assert reply.json()["choices"][0]["finish_reason"] == "content_filter"
            assert upstream.asked == []
            assert at_work.chat(user="anvil").json()["choices"][0]["finish_reason"] == "stop"
            assert ["user" in one for one in upstream.asked] == [False], "it is passed to nobody"


@pytest.mark.parametrize(
    "more",
    [
        '"top_k": 1' + "0" * 5000,
        '"top_k": 1e999',
        '"top_k": NaN',
        '"top_k": -Infinity',
        '"temperature": NaN',
        '"temperature": 1e999',
        '"seed": 1' + "0" * 5000,
        '"max_tokens": 1' + "0" * 400,
        '"top_k": ' + "[" * 100_000,
        '"top_k": ' + '{"a":' * 150 + "1" + "}" * 150,
        '"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": '
        '{"maximum": 1' + "0" * 5000 + "}}}",
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1'
        + "0" * 5000 + "}}}]",
        '"x\\r\\nset-cookie: a": 1',
        '"\\ud800": 1',
    ],
    ids=lambda more: more[:20],
)  # fmt: skip
def test_numbers_nesting_and_names_of_options_break_nothing(more: str) -> None:
    body = '{"model": "m", "messages": [{"role": "user", "content": "Hi"}], ' + more + "}"
    with before(lambda asked: [whole(answer())]) as (at_work, upstream):
        reply = at_work.client.post("/v1/chat/completions", content=body.encode())
        assert reply.status_code in (200, 400), reply.text
        assert "set-cookie" not in reply.headers
        if reply.status_code == 400:
            assert reply.json()["error"]["message"]
            assert upstream.asked == []
        assert at_work.chat().status_code == 200
