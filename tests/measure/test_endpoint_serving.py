"""An endpoint asked by many at once: streams in any form, tools, pictures, calls given up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import formatdate
from typing import Any

import pytest
from completions_server import Asked, serving
from completions_server import Reply as Sent

from delible.messages import ImagePart, Message, TextPart, Tool, ToolCall
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import Responder
from delible.system.replies import Piece, Reply, TokenLogprob, ToolCallPiece, Unanswered, Usage
from delible.systems.endpoint import ROOM_TO_THINK, Endpoint
from delible.systems.serving import responder

WHO = Prompt.ask("Who?")
TOOL = Tool(name="look_up", description="Looks a name up.")
ASK = Prompt(WHO.messages, tools=(TOOL,), tool_choice="look_up")
QUICK: dict[str, Any] = {"backoff_seconds": 0.01, "timeout_seconds": 5.0, "attempts": 3}
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("DELIBLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    content = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def speaks(*texts: str) -> list[bytes]:
    """A whole stream, with the usage in an event of its own."""
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts)}}
    said = [event({"content": text}) for text in texts]
    return [
        event({"role": "assistant", "content": ""}), *said, event({}, "stop"),
        f"data: {json.dumps(usage)}\n\n".encode(), DONE,
    ]  # fmt: skip


def once(*replies: Sent) -> Callable[[Asked], Sent]:
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


async def collected(endpoint: Endpoint, prompt: Prompt, decoding: Decoding) -> list[Piece]:
    return [piece async for piece in endpoint.stream(prompt, decoding)]


def heard(
    script: Callable[[Asked], Sent], prompt: Prompt = WHO, decoding: Decoding | None = None,
    **options: Any,
) -> tuple[list[Piece], Endpoint, list[Asked]]:  # fmt: skip
    """The pieces of one answer, the endpoint, and what the server was asked."""
    with serving(script) as server:
        endpoint = Endpoint(server.url, "small", **QUICK, **options)

        async def scene() -> list[Piece]:
            try:
                return await collected(endpoint, prompt, decoding or Decoding(9))
            finally:
                await endpoint.aclose()

        return asyncio.run(scene()), endpoint, server.asked


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# ---- streams


def test_an_answer_comes_in_pieces_and_ends_with_its_usage() -> None:
    pieces, endpoint, asked = heard(once(Sent(sent=speaks("Ada", " Norr", "by"))))
    assert [piece.text for piece in pieces] == ["Ada", " Norr", "by", ""]
    assert [piece.finish for piece in pieces] == [None, None, None, "stop"]
    assert pieces[-1].usage == Usage(7, 3)
    assert asked[0].body == {
        "model": "small", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 9,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert isinstance(endpoint, Responder)
    assert responder(endpoint) is endpoint


def test_events_may_be_cut_anywhere() -> None:
    said = "Vä\u2028i\x85s"  # with separators that Unicode counts as ends of a line
    for ending in (b"\n", b"\r\n"):
        whole = b": keep-alive\n\n" + b"".join(speaks(*said)).replace(b"\n", ending)
        for size in (9, 64, len(whole)):
            chunks = [whole[start : start + size] for start in range(0, len(whole), size)]
            pieces, _, _ = heard(once(Sent(sent=chunks)))
            assert text_of(pieces) == said
            assert pieces[-1].usage == Usage(7, len(said))


def test_a_stream_that_dies_is_no_answer_and_what_was_said_is_not_said_again() -> None:
    begun = speaks("Ada", " Norrby")[:2]
    failure = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
    for sent, reason in (
        (Sent(sent=begun), "the answer broke off"),
        (Sent(sent=begun, headers={"Content-Length": "9999"}), "the connection failed"),
        (Sent(sent=begun, held=True), "no answer within 0.3 seconds"),
        (Sent(sent=[*begun, failure]), "the server says 500: out of memory"),
        (Sent(sent=[*begun, b'data: {"cho\n\n']), "the reply is not JSON"),
    ):
        with serving(once(sent)) as server:
            endpoint = Endpoint(server.url, "small", timeout_seconds=0.3, attempts=3)
            stream = endpoint.stream(WHO, Decoding(9))

            async def scene() -> list[str]:
                texts = [(await anext(stream)).text]  # noqa: B023
                with pytest.raises(Unanswered, match=reason):  # noqa: B023
                    await anext(stream)  # noqa: B023
                return texts

            assert asyncio.run(scene()) == ["Ada"]
            assert len(server.asked) == 1


def test_a_stream_that_fails_before_it_speaks_is_tried_again() -> None:
    busy = b'data: {"error": {"message": "busy", "code": 429}}\n\n'
    for broken in (
        Sent(sent=[busy]),
        Sent(sent=[b": nothing\n\n"]),
        Sent(broken="drop"),
        Sent(status=503, body=b"busy"),
    ):
        pieces, _, asked = heard(once(broken, Sent(sent=speaks("Ada"))))
        assert text_of(pieces) == "Ada"
        assert len(asked) == 2


def test_what_is_missing_after_the_end_of_an_answer_does_not_matter() -> None:
    pieces, _, _ = heard(once(Sent(sent=speaks("Ada")[:3])))
    assert (text_of(pieces), pieces[-1].finish, pieces[-1].usage) == ("Ada", "stop", Usage())


def test_the_end_of_a_stream_ends_the_answer_whenever_its_reason_comes_if_it_does() -> None:
    pieces, _, _ = heard(once(Sent(sent=[event({"content": "Ada"}), DONE])))
    assert (text_of(pieces), pieces[-1].finish) == ("Ada", "stop")
    sent = [event({"content": "Ada"}, "length"), event({}), DONE]
    pieces, _, _ = heard(once(Sent(sent=sent)))
    assert (text_of(pieces), pieces[-1].finish) == ("Ada", "length")


def test_a_server_that_does_not_stream_answers_whole() -> None:
    pieces, _, _ = heard(once(Sent("Ada Norrby")))
    assert (text_of(pieces), pieces[-1].finish) == ("Ada Norrby", "stop")


def test_a_stream_gives_what_a_whole_reply_gives() -> None:
    cases: tuple[tuple[tuple[str, ...], Prompt, Decoding], ...] = (
        (("  Ada ", "z", "z", " Bob"), WHO, Decoding(9, ("zz",))),
        (("Su", "re:", " Ada"), Prompt(WHO.messages, prefill="Sure:"), Decoding(9)),
        (("<think>\nzz", "</think>A", "da zz Bob"), WHO, Decoding(9, ("zz",))),
        (("", "\n"), WHO, Decoding(9)),
    )
    for texts, prompt, decoding in cases:
        pieces, _, _ = heard(once(Sent(sent=speaks(*texts))), prompt, decoding)
        with serving(once(Sent("".join(texts)))) as server:
            whole = Endpoint(server.url, "small").generate([prompt], decoding)[0]
        assert text_of(pieces) == whole


def test_thoughts_of_their_own_field_come_first_and_alone_are_no_answer() -> None:
    thinks = [event({"reasoning_content": part}) for part in ("I recall", ": Ada.")]
    pieces, _, _ = heard(once(Sent(sent=[*thinks, *speaks("Ada")])))
    assert text_of(pieces) == "<think>\nI recall: Ada.\n</think>\n\nAda"
    assert len(pieces) == 4
    with serving(once(Sent(sent=[*thinks, event({}, "length"), DONE]))) as server:
        endpoint = Endpoint(server.url, "small", **QUICK)
        for limit in (9, 9 + ROOM_TO_THINK):  # the next answer has room for it
            with pytest.raises(Unanswered, match="while it was thinking"):
                asyncio.run(collected(endpoint, WHO, Decoding(9)))
            assert server.asked[-1].body["max_tokens"] == limit


def test_a_server_without_stream_options_is_asked_without_them_and_nothing_is_noted() -> None:
    def reply(asked: Asked) -> Sent:
        if "stream_options" in asked.body:
            return Sent(status=400, body=b"Unknown parameter: stream_options")
        return Sent(sent=speaks("Ada"))

    pieces, endpoint, asked = heard(reply)
    assert (text_of(pieces), len(asked), endpoint.notes) == ("Ada", 2, [])


# ---- tools, pictures, log-probabilities


def calling(*calls: dict[str, Any]) -> Sent:
    message = {"role": "assistant", "content": None, "tool_calls": list(calls)}
    return Sent(message=message, finish="tool_calls")


def test_tools_are_offered_and_calls_come_back() -> None:
    about = {"name": "look_up", "arguments": '{"name": "Ada"}'}
    with serving(once(calling({"id": "c1", "type": "function", "function": about}))) as server:
        endpoint = Endpoint(server.url, "small")
        reply = asyncio.run(endpoint.respond(ASK, Decoding(9)))
        expected = (ToolCall(id="c1", name="look_up", arguments='{"name": "Ada"}'),)
        assert reply == Reply("", "tool_calls", Usage(), expected)
        assert endpoint.generate([ASK], Decoding(9)) == [
            NoAnswer("it calls tools and says nothing")
        ]
        said = Message(role="assistant", content="", tool_calls=reply.tool_calls)
        told = Message(role="tool", content="a poet", tool_call_id="c1")
        asyncio.run(endpoint.respond(Prompt((*WHO.messages, said, told)), Decoding(9)))
    first, *_, last = server.asked
    assert first.body["tools"] == [TOOL.declared()]
    assert first.body["tool_choice"] == {"type": "function", "function": {"name": "look_up"}}
    assert last.body["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c1", "type": "function", "function": about}
        ]},
        {"role": "tool", "content": "a poet", "tool_call_id": "c1"},
    ]  # fmt: skip
    assert "tools" not in last.body


def test_calls_come_in_parts() -> None:
    def part(index: int, **more: Any) -> bytes:
        return event({"tool_calls": [{"index": index, **more}]})

    sent = [
        part(0, id="c1", type="function", function={"name": "look_up", "arguments": ""}),
        part(0, function={"arguments": '{"name": '}),
        part(1, id="c2", function={"name": "look_up", "arguments": "{}"}),
        part(0, id="c1", function={"name": "look_up", "arguments": '"Ada"}'}),
        event({}, "tool_calls"),
        DONE,
    ]
    pieces, _, _ = heard(once(Sent(sent=sent)), ASK)
    assert [one for piece in pieces for one in piece.tool_calls] == [
        ToolCallPiece(0, "c1", "look_up"),
        ToolCallPiece(0, arguments='{"name": '),
        ToolCallPiece(1, "c2", "look_up", "{}"),
        ToolCallPiece(0, arguments='"Ada"}'),
    ]
    assert pieces[-1].finish == "tool_calls"


def test_pictures_are_sent_as_data() -> None:
    picture = ImagePart.model_validate({"source": b"GIF89a"})
    turn = Message(role="user", content=(TextPart(text="What is this?"), picture))
    with serving(once(Sent("A dot."))) as server:
        assert Endpoint(server.url, "small").generate([Prompt((turn,))], Decoding(9)) == ["A dot."]
    assert server.asked[0].body["messages"][0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlh"}},
    ]


def test_log_probabilities_where_they_are_asked_for() -> None:
    def told(*tokens: str) -> dict[str, Any]:
        return {"content": [{"token": token, "logprob": -0.5, "bytes": []} for token in tokens]}

    expected = (TokenLogprob("A", -0.5), TokenLogprob("da", -0.5))
    sent = [event({"content": "A"}, logprobs=told("A")), event({"content": "da"}, "stop",
            logprobs=told("da")), DONE]  # fmt: skip
    pieces, _, asked = heard(once(Sent(sent=sent)), logprobs=True)
    assert tuple(one for piece in pieces for one in piece.logprobs) == expected
    assert asked[0].body["logprobs"] is True
    choice = {"text": "Ada", "logprobs": {"tokens": ["A", "da"], "token_logprobs": [-0.5, -0.5]}}
    with serving(once(Sent(body=json.dumps({"choices": [choice]}).encode()))) as server:
        endpoint = Endpoint(server.url, "small", logprobs=True)
        assert asyncio.run(endpoint.respond(Prompt(text="I am"), Decoding(9))).logprobs == expected
        assert server.asked[0].body["logprobs"] == 1
    with serving(once(Sent("Ada"))) as server:
        reply = asyncio.run(Endpoint(server.url, "small").respond(WHO, Decoding(9)))
        assert reply.logprobs is None
        assert "logprobs" not in server.asked[0].body


# ---- calls that are given up, and waits


def given_up(reply: Sent, call: Callable[[Endpoint], Awaitable[Any]]) -> bool:
    """Whether the server saw that the client hung up, soon after the call was cancelled."""
    with serving(once(reply)) as server:
        endpoint = Endpoint(server.url, "small", timeout_seconds=20.0)

        async def scene() -> bool:
            task = asyncio.ensure_future(call(endpoint))
            while not server.asked:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(server.hung_up.wait, 5)

        return asyncio.run(scene())


def test_a_cancelled_call_is_cancelled_at_the_server() -> None:
    async def read(endpoint: Endpoint) -> None:
        async for _ in endpoint.stream(WHO, Decoding(9)):
            pass

    waiting, speaking = Sent(sent=[], held=True), Sent(sent=speaks("Ada")[:2], held=True)
    assert given_up(waiting, lambda endpoint: endpoint.respond(WHO, Decoding(9)))
    assert given_up(waiting, read)
    assert given_up(speaking, read)


def test_a_call_that_waits_for_its_next_attempt_can_be_cancelled() -> None:
    busy = Sent(status=429, body=b"", headers={"Retry-After": "30"})
    with serving(once(busy, Sent("Ada"))) as server:
        endpoint = Endpoint(server.url, "small", **QUICK)

        async def scene() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(endpoint.respond(WHO, Decoding(4)), 0.5)

        began = time.time()
        asyncio.run(scene())
        assert time.time() - began < 10
        assert len(server.asked) == 1


def test_closing_a_stream_ends_its_work_at_the_server() -> None:
    with serving(once(Sent(sent=speaks("Ada")[:2], held=True))) as server:
        endpoint = Endpoint(server.url, "small")

        async def scene() -> bool:
            stream = endpoint.stream(WHO, Decoding(9))
            assert (await anext(stream)).text == "Ada"
            await stream.aclose()
            return await asyncio.to_thread(server.hung_up.wait, 5)

        assert asyncio.run(scene())


def test_the_server_says_until_when_to_wait() -> None:
    began = time.time()
    until = formatdate(began + 2, usegmt=True)  # whole seconds: between one and two of them
    busy = Sent(status=429, body=b"", headers={"Retry-After": until})
    with serving(once(busy, Sent("Ada"))) as server:
        assert Endpoint(server.url, "small", **QUICK).generate([WHO], Decoding(4)) == ["Ada"]
    assert 0.9 <= time.time() - began < 4


def test_many_calls_at_once_share_the_connections_and_wait_for_one_without_a_limit() -> None:
    def slow(asked: Asked) -> Sent:
        time.sleep(0.1)
        return Sent(asked.body["messages"][-1]["content"])

    with serving(slow) as server:
        endpoint = Endpoint(server.url, "small", concurrency=2, timeout_seconds=0.3, attempts=1)

        async def every() -> list[Reply]:
            prompts = [Prompt.ask(str(number)) for number in range(10)]
            calls = (endpoint.respond(prompt, Decoding(4)) for prompt in prompts)
            return list(await asyncio.gather(*calls))

        assert [reply.text for reply in asyncio.run(every())] == [str(n) for n in range(10)]
        assert server.most_at_once == 2


def test_a_batch_is_answered_within_a_running_loop_and_told_of_as_it_goes() -> None:
    told: list[int] = []
    with serving(lambda asked: Sent("Ada")) as server:
        endpoint = Endpoint(server.url, "small", **QUICK)
        endpoint.on_answers = told.append

        async def notebook() -> list[str | NoAnswer]:
            return endpoint.generate([WHO] * 5, Decoding(4))

        assert asyncio.run(notebook()) == ["Ada"] * 5
    assert told == [1] * 5
