"""Many calls at once: everyone gets the answer it would get alone, in pieces that never change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from delible.lm.lm import LM
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, Responder, System
from delible.system.replies import Piece, Reply, Unanswered
from delible.systems.serving import Gathered, Served, Waiting, responder, settled
from delible.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt.ask("Where was Ada Norrby born?"),
    Prompt.ask("Who?"),
    Prompt.ask("Which prize did the painter win, and in which year was it given to her?"),
    Prompt.ask("Name a river.", prefill="The river"),
    Prompt(text="Once upon a time"),
]
DECODINGS = [Decoding(9), Decoding(3), Decoding(7, temperature=0.8, seed=4), Decoding(12)]


def tiny() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


@pytest.fixture
def served() -> Iterator[Served]:
    system = Served(tiny())
    yield system
    system.close()


def test_everyone_gets_the_answer_it_would_get_alone(served: Served) -> None:
    cases = [(prompt, decoding) for prompt in PROMPTS for decoding in DECODINGS]
    alone = [tiny().generate([prompt], decoding)[0] for prompt, decoding in cases]

    async def every() -> list[Reply]:
        shuffled = random.Random(0)

        async def one(prompt: Prompt, decoding: Decoding) -> Reply:
            await asyncio.sleep(shuffled.random() / 20)
            return await served.respond(prompt, decoding)

        return list(await asyncio.gather(*(one(*case) for case in cases)))

    replies = asyncio.run(every())
    assert [reply.text for reply in replies] == alone
    for reply, (prompt, decoding) in zip(replies, cases, strict=True):
        assert reply.usage.prompt_tokens == len(served.lm.template.prompt_ids(prompt))
        assert 0 < reply.usage.completion_tokens <= decoding.max_new_tokens
        whole = reply.usage.completion_tokens == decoding.max_new_tokens
        assert reply.finish == ("length" if whole else "stop")


async def pieces_of(stream: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in stream]


def test_pieces_make_the_whole_and_hold_back_the_beginning_of_a_stop_text(served: Served) -> None:
    whole = str(tiny().generate(PROMPTS[:1], Decoding(16))[0])
    assert len(whole) > 8
    found = asyncio.run(pieces_of(served.stream(PROMPTS[0], Decoding(16))))
    assert "".join(piece.text for piece in found) == whole
    assert [piece.finish is None for piece in found] == [True] * (len(found) - 1) + [False]
    assert len(found) > 2
    for start in range(1, len(whole) - 3, 5):
        stop = (whole[start : start + 3],)
        cut = asyncio.run(pieces_of(served.stream(PROMPTS[0], Decoding(16, stop=stop))))
        expected = tiny().generate(PROMPTS[:1], Decoding(16, stop=stop))[0]
        assert "".join(piece.text for piece in cut) == expected


def test_what_may_still_change_is_held_back() -> None:
    assert settled(" The riv", ("river",)) == "The"
    assert settled("The rive", ("xyz",)) == "The rive"
    assert settled("The aab", ("abc", "bcd")) == "The a"
    assert settled("caf\ufffd", ()) == "caf"
    assert settled("  \n", ()) == ""


def test_a_cancelled_call_frees_its_row_and_disturbs_nobody(served: Served) -> None:
    expected = tiny().generate(PROMPTS[2:3], Decoding(60))[0]
    widths: list[int] = []
    backbone = served.lm.core.get_submodule(served.lm.anatomy.backbone)
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    async def scene() -> Reply:
        long = asyncio.create_task(served.respond(PROMPTS[2], Decoding(60)))
        stream = served.stream(PROMPTS[0], Decoding(1000))
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        other = asyncio.create_task(served.respond(PROMPTS[1], Decoding(1000)))
        await asyncio.sleep(0.02)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        return await long

    assert asyncio.run(scene()).text == expected
    served.close()
    assert max(widths) >= 2
    assert len(widths) < 200, "the cancelled rows went on"


def test_a_prompt_that_does_not_fit_is_told(served: Served) -> None:
    long = Prompt.ask("word " * 5000)
    with pytest.raises(Unanswered, match="longer than"):
        asyncio.run(served.respond(long, Decoding(2)))
    assert asyncio.run(served.respond(PROMPTS[1], Decoding(2))).text


def test_a_model_that_fails_tells_whoever_is_speaking(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(served.lm.template, "prompt_ids", lambda prompt: [10**9])
        with pytest.raises(Unanswered, match="the model failed"):
            asyncio.run(served.respond(PROMPTS[1], Decoding(2)))
    assert asyncio.run(served.respond(PROMPTS[1], Decoding(2))).text


class Echo(BlackBox):
    """Says the question again; counts its batches."""

    name, fingerprint = "echo", "echo"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.batches.append(len(prompts))
        texts = [prompt.messages[-1].content for prompt in prompts]
        return [NoAnswer("no word") if text == "" else text for text in texts]


def test_calls_that_wait_together_are_one_batch() -> None:
    echo = Echo()
    gathered = Gathered(echo)

    async def every() -> list[Reply | BaseException]:
        calls = [gathered.respond(Prompt.ask(str(n or "")), Decoding(4)) for n in range(6)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    first, *others = asyncio.run(every())
    assert isinstance(first, Unanswered)
    assert [reply.text for reply in others if isinstance(reply, Reply)] == list("12345")
    assert echo.batches == [6]


def test_there_and_back_again(served: Served) -> None:
    system: System = Waiting(served)
    assert system.capabilities == {"generate"}
    assert system.generate(PROMPTS, Decoding(6)) == tiny().generate(PROMPTS, Decoding(6))
    echo: System = Waiting(Gathered(Echo()))
    assert echo.generate([Prompt.ask("a"), Prompt.ask("")], Decoding(1)) == [
        "a",
        NoAnswer("no word"),
    ]


def test_the_way_is_chosen_by_what_the_system_is(served: Served) -> None:
    assert responder(served) is served
    assert isinstance(responder(served.lm), Served)
    assert isinstance(responder(Echo()), Gathered)
    assert isinstance(served, Responder)
