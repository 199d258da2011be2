"""The official client, and a plain one, before systems of several kinds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from gateway_at_work import STREAM, Puppet, Working, answer, before, said, whole, working

from delible.lm.lm import LM
from delible.system.asks import Decoding
from delible.system.replies import Piece, TokenLogprob, Usage
from delible.testing.tiny import tiny_model, tiny_tokenizer

HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@pytest.fixture
def puppet() -> Puppet:
    return Puppet()


@pytest.fixture
def at_work(puppet: Puppet) -> Iterator[Working]:
    with working(puppet) as found:
        yield found


def client(at_work: Working) -> openai.OpenAI:
    return openai.OpenAI(base_url=at_work.url, api_key="none", max_retries=0)


def test_the_official_client_gets_whole_answers(at_work: Working, puppet: Puppet) -> None:
    with client(at_work) as asking:
        assert [one.id for one in asking.models.list()] == ["m"]
        assert asking.models.retrieve("m").owned_by == "delible"
        found = asking.chat.completions.create(
            model="m", messages=HI, max_tokens=9, temperature=0.5, top_p=0.8, seed=4,
            stop=["#", ";"], n=2, presence_penalty=0, frequency_penalty=0,
        )  # fmt: skip
        assert [one.message.content for one in found.choices] == ["Hello.", "Hello."]
        assert [one.index for one in found.choices] == [0, 1]
        assert {one.finish_reason for one in found.choices} == {"stop"}
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 4)
        assert [decoding for _, decoding in puppet.asked] == [
            Decoding(9, ("#", ";"), 0.5, 0.8, seed) for seed in (4, 5)
        ]
        text = asking.completions.create(model="m", prompt=["One", "Two"])
        assert [one.text for one in text.choices] == ["Hello."] * 2
        assert [prompt.text for prompt, _ in puppet.asked[2:]] == ["One", "Two"]
        response = asking.responses.create(model="m", input="Hi", instructions="Be brief.")
        assert (response.output_text, response.status) == ("Hello.", "completed")
        assert [turn.role for turn in puppet.asked[-1][0].messages] == ["system", "user"]


def test_who_sets_no_limits_gets_draws_of_its_own(at_work: Working, puppet: Puppet) -> None:
    for _ in range(2):
        at_work.chat()
    first, second = (decoding for _, decoding in puppet.asked)
    assert first.max_new_tokens == 1024
    assert first.temperature == pytest.approx(1.0)
    assert first.seed != second.seed


def test_the_official_client_streams(at_work: Working) -> None:
    with client(at_work) as asking:
        chunks = list(
            asking.chat.completions.create(
                model="m", messages=HI, stream=True, stream_options={"include_usage": True}
            )
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(one.delta.content or "" for one in deltas) == "Hello."
        assert [one.finish_reason for one in deltas if one.finish_reason] == ["stop"]
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 9
        text = asking.completions.create(model="m", prompt="One", stream=True)
        assert "".join(chunk.choices[0].text for chunk in text) == "Hello."
        with asking.responses.stream(model="m", input="Hi") as events:
            kinds = [event.type for event in events]
            assert events.get_final_response().output_text == "Hello."
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"


def test_the_asynchronous_client_asks_many_at_once(at_work: Working, puppet: Puppet) -> None:
    puppet.lines = lambda prompt: [0.05, Piece(prompt.messages[0].text, "stop")]

    async def every() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=at_work.url, api_key="none") as asking:

            async def one(number: int) -> str | None:
                found = await asking.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": f"n{number}"}]
                )
                return found.choices[0].message.content

            return list(await asyncio.gather(*map(one, range(20))))

    assert asyncio.run(every()) == [f"n{number}" for number in range(20)]


def test_a_stream_without_wishes_has_no_usage_and_one_end(at_work: Working) -> None:
    events = at_work.events()
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    chunks = events[:-1]
    assert all("usage" not in chunk for chunk in chunks)
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert ends == chunks[-1:]
    assert ends[0]["choices"][0]["delta"] == {}


def test_several_answers_stream_side_by_side(at_work: Working) -> None:
    events = at_work.events(n=3, stream_options={"include_usage": True})
    texts, ends = {0: "", 1: "", 2: ""}, []
    for chunk in events[:-2]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] * bool(choice["finish_reason"])
    assert texts == {0: "Hello.", 1: "Hello.", 2: "Hello."}
    assert sorted(ends) == [0, 1, 2]
    assert events[-2]["usage"]["prompt_tokens"] == 7
    assert events[-2]["usage"]["completion_tokens"] == 6


def test_tools_go_through_to_a_server_and_calls_come_back() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}

    def sent(body: dict[str, Any]) -> list[Any]:
        if not body.get("stream"):
            return [whole(answer("", tool_calls=[call]))]
        parts: list[Any] = [
            {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"to'}},
            {"index": 0, "function": {"arguments": 'wn": "Umber"}'}},
        ]
        pieces = [said(delta={"tool_calls": [part]}) for part in parts]
        return [STREAM, *pieces, said(finish_reason="tool_calls"), b"data: [DONE]\n\n"]

    with before(sent) as (at_work, upstream), client(at_work) as asking:
        found = asking.chat.completions.create(
            model="m", messages=HI, tools=[WEATHER], tool_choice="required",
            parallel_tool_calls=False,
        )  # fmt: skip
        assert found.choices[0].finish_reason == "tool_calls"
        calls: Any = found.choices[0].message.tool_calls
        assert (calls[0].id, calls[0].function.name) == ("c1", "weather")
        assert upstream.asked[-1]["tools"] == [WEATHER]
        assert upstream.asked[-1]["tool_choice"] == "required"
        assert upstream.asked[-1]["parallel_tool_calls"] is False
        with asking.chat.completions.stream(model="m", messages=HI, tools=[WEATHER]) as events:
            streamed: Any = events.get_final_completion().choices[0].message.tool_calls
        assert json.loads(streamed[0].function.arguments) == {"town": "Umber"}
        turns = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        ]
        asking.chat.completions.create(model="m", messages=turns)
        assert upstream.asked[-1]["messages"][1]["tool_calls"] == [call]
        assert upstream.asked[-1]["messages"][2]["content"] == "Rain."


def test_a_server_gets_the_options_as_the_client_gave_them() -> None:
    with before(lambda _: [whole(answer())]) as (at_work, upstream):
        at_work.chat()
        assert set(upstream.asked[-1]) == {"model", "messages"}
        at_work.chat(max_completion_tokens=5, temperature=0, seed=3, stop="x")
        body = upstream.asked[-1]
        assert body["model"] == "up"
        assert (body["max_completion_tokens"], body["seed"], body["stop"]) == (5, 3, ["x"])
        assert body["temperature"] == pytest.approx(0)
        assert "max_tokens" not in body
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
        reply = at_work.chat(max_tokens=5, response_format=form, reasoning_effort="low", seed=0)
        body = upstream.asked[-1]
        assert (body["max_tokens"], body["response_format"], body["seed"]) == (5, form, 0)
        assert body["reasoning_effort"] == "low"
        assert (
            "'reasoning_effort' is not known here and was passed on"
            in (reply.headers["x-delible-warning"])
        )


def test_log_probabilities_come_where_the_system_has_them() -> None:
    logged = (TokenLogprob("Hi", -0.5),)
    puppet = Puppet([Piece("Hi", logprobs=logged), Piece("", "stop", Usage(1, 1))], "logprobs")
    with working(puppet) as at_work:
        content = at_work.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
        assert [(one["token"], one["logprob"]) for one in content] == [("Hi", -0.5)]
        events = at_work.events(logprobs=True)
        streamed = [one["choices"][0].get("logprobs") for one in events[:-1]]
        assert streamed[1]["content"] == content
        assert at_work.chat().json()["choices"][0]["logprobs"] is None
        puppet.lines = [Piece("No.", "content_filter", logprobs=logged)]
        assert at_work.chat(logprobs=True).json()["choices"][0]["logprobs"] is None
        assert '"logprob"' not in json.dumps(at_work.events(logprobs=True))
    with working(Puppet()) as at_work:
        assert at_work.chat(logprobs=True).status_code == 400


def test_a_model_on_this_machine_answers_whole_and_streamed_alike() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    with working(lm) as at_work:
        asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
        found = at_work.chat(**asked).json()
        text = found["choices"][0]["message"]["content"]
        events = at_work.events(stream_options={"include_usage": True}, **asked)
        deltas = [one["choices"][0]["delta"] for one in events[:-2]]
        assert "".join(delta.get("content", "") for delta in deltas) == text != ""
        assert events[-2]["usage"] == found["usage"]
        assert found["usage"]["completion_tokens"] == 12
        assert at_work.chat("x" * 2000).json()["error"]["code"] == "context_length_exceeded"
        assert at_work.chat(response_format={"type": "json_object"}).status_code == 400
        assert at_work.chat(tools=[WEATHER]).status_code == 400
