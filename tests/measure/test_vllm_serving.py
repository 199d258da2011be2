"""vLLM's asynchronous engine as a system that serves, by a stand-in with its interface."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
import vllm_stand_in

from delible.errors import MissingExtraError
from delible.lm.lm import LM
from delible.records import ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import Responder, System
from delible.system.replies import Piece, Reply, Unanswered
from delible.systems.guarded import guard
from delible.systems.opening import open_system
from delible.systems.vllm import VLLM
from delible.systems.vllm_serving import ServingVLLM
from delible.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [Prompt.ask(text) for text in ("Who?", "Where was Ada born?", "Why?")]
PLAIN = Decoding(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ServingVLLM:
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in.module())
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", vllm_stand_in.parameters_module())
    found = open_system(f"vllm:{folder}", serving=True)
    assert isinstance(found, ServingVLLM)
    return found


async def pieces(system: ServingVLLM, prompt: Prompt, decoding: Decoding) -> list[Piece]:
    return [piece async for piece in system.stream(prompt, decoding)]


def test_it_is_opened_to_serve_alone(served: ServingVLLM, folder: Path) -> None:
    assert isinstance(served, System)
    assert isinstance(served, Responder)
    assert "score" not in served.capabilities
    assert not isinstance(open_system(f"vllm:{folder}"), ServingVLLM), "an audit scores"
    assert served.engine.inner.gpu_memory_utilization == pytest.approx(0.9)


def test_answers_are_those_of_the_model_whole_streamed_and_in_batches(
    served: ServingVLLM, folder: Path
) -> None:
    lm = LM.load(str(folder), precision="float32", device="cpu")
    first = str(lm.generate(PROMPTS[:1], PLAIN)[0])
    for decoding in (PLAIN, Decoding(8, stop=(first[2:4],)), Decoding(3)):
        wanted = lm.generate(PROMPTS, decoding)
        assert served.generate(PROMPTS, decoding) == wanted
        for prompt, text in zip(PROMPTS, wanted, strict=True):
            reply = asyncio.run(served.respond(prompt, decoding))
            found = asyncio.run(pieces(served, prompt, decoding))
            assert reply.text == text == "".join(piece.text for piece in found)
            assert [piece.finish for piece in found[:-1]] == [None] * (len(found) - 1)
            assert found[-1].finish == reply.finish
            assert found[-1].usage == reply.usage
            assert reply.usage.prompt_tokens == len(served.template.prompt_ids(prompt))
            assert 0 < reply.usage.completion_tokens <= decoding.max_new_tokens
    assert reply.finish == "length"
    assert len(asyncio.run(pieces(served, PROMPTS[0], PLAIN))) > 2, "it speaks as it goes"


def test_what_is_spoken_is_never_taken_back(served: ServingVLLM) -> None:
    """Blanks at either end are no part of an answer, and a stop text is not begun."""

    class Spoken:
        def __init__(self, *texts: str) -> None:
            self.texts = texts

        async def generate(self, prompt: Any, how: Any, request_id: str) -> AsyncIterator[Any]:
            for place, text in enumerate(self.texts, start=1):
                reason = "stop" if place == len(self.texts) else None
                one = vllm_stand_in.CompletionOutput(text, [place], reason)
                yield vllm_stand_in.RequestOutput([one], None)

    for texts, stop, wanted in (
        ((" \n", " Hel", "lo ", " ", "you \n", ""), (), "Hello  you"),
        (("Hello E", "N", "D of"), ("END",), "Hello"),
        (("Hello E", "N", "d"), ("END",), "Hello ENd"),
    ):
        served.engine = Spoken(*texts)
        found = asyncio.run(pieces(served, PROMPTS[0], Decoding(9, stop=stop)))
        assert "".join(piece.text for piece in found) == wanted
        assert found[-1].usage is not None
        assert found[-1].usage.completion_tokens == len(texts)
    served.engine = Spoken()
    with pytest.raises(Unanswered, match="broke off"):
        asyncio.run(served.respond(PROMPTS[0], PLAIN))


def test_calls_are_under_way_at_once_and_leave_when_cancelled(served: ServingVLLM) -> None:
    async def together() -> list[Reply]:
        return list(await asyncio.gather(*(served.respond(one, PLAIN) for one in PROMPTS)))

    asyncio.run(together())
    assert served.engine.most == len(PROMPTS)
    assert served.engine.aborted == []

    async def until(count: int) -> None:
        async with asyncio.timeout(20):
            while len(served.engine.under_way) != count:
                await asyncio.sleep(0.01)

    async def left() -> None:
        async with aclosing(cast(Any, served.stream(PROMPTS[0], Decoding(60)))) as spoken:
            async for _ in spoken:
                break
        await until(0)
        waiting = asyncio.create_task(served.respond(PROMPTS[1], Decoding(60)))
        await until(1)
        waiting.cancel()
        await until(0)

    asyncio.run(left())
    assert not served.engine.under_way
    assert len(served.engine.aborted) == 2


def test_what_fails_is_told_without_what_was_asked(served: ServingVLLM) -> None:
    long = Prompt.ask("word " * 5000)
    with pytest.raises(Unanswered, match="longer than") as error:
        asyncio.run(served.respond(long, PLAIN))
    assert error.value.status == 400
    assert isinstance(served.generate([long], PLAIN)[0], NoAnswer)
    served.engine.fails = True
    with pytest.raises(Unanswered, match=r"the engine failed \(RuntimeError\)"):
        asyncio.run(served.respond(PROMPTS[0], PLAIN))


def test_a_guard_stands_before_it_and_it_ends(served: ServingVLLM) -> None:
    request = ForgetRequest(subjects=("Ada Brook",))
    guarded = guard(served, request, similarity=False)
    reply = asyncio.run(guarded.respond(Prompt.ask("Who is Ada Brook?"), PLAIN))
    assert reply.finish == "content_filter"
    assert served.engine.most == 0
    assert asyncio.run(guarded.respond(PROMPTS[0], PLAIN)).text
    served.close()
    assert served.engine.ended
    assert not served._thread.is_alive()


def test_without_vllm_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match="vllm"):
        open_system(f"vllm:{folder}", serving=True)
    assert issubclass(ServingVLLM, VLLM)


def test_the_gateway_serves_it_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx2")
    pytest.importorskip("uvicorn")
    from delible.gateway.serving import serve

    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in.module())
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", vllm_stand_in.parameters_module())
    request = ForgetRequest(subjects=("Ada Brook",))
    guards = [{"name": "target_detector", "similarity": False}]
    lm = LM.load(str(folder), precision="float32", device="cpu")
    with serve(
        f"vllm:{folder}", request=request, guards=guards, name="mine", port=0, background=True
    ) as serving:  # type: ignore[union-attr]

        def said(question: str) -> dict[str, Any]:
            body = {
                "model": "mine", "max_tokens": 8, "temperature": 0,
                "messages": [{"role": "user", "content": question}],
            }  # fmt: skip
            answer = httpx.post(
                f"{serving.url}/chat/completions", json=body, timeout=30, trust_env=False
            )
            assert answer.status_code == 200
            return cast(dict[str, Any], answer.json()["choices"][0])

        told = said("Who?")
        assert told["message"]["content"] == lm.generate(PROMPTS[:1], PLAIN)[0]
        assert said("Who is Ada Brook?")["finish_reason"] == "content_filter"
