"""What a guard may do, in batches and when serving; what it does not judge does not pass it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from delible.errors import RunError
from delible.messages import ImagePart, Message, Tool, ToolCall
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, Responder, System
from delible.system.replies import Piece, Reply, TokenLogprob, ToolCallPiece, Unanswered, Usage
from delible.system.role import Role, RoleOptions
from delible.systems.guarded import GuardedSystem, GuardMind
from delible.systems.judging import Consult, Forward, Judged, Refuse, Say
from delible.systems.scripted import Scripted

SENTINEL = "Zanzibar Quillfeather"
DECODING = Decoding(8)


class Open(BlackBox):
    """Answers whatever it is asked."""

    name, fingerprint = "open", "open"

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return ["Ada"] * len(prompts)


class Speaking:
    """Streams what it is given."""

    name = "speaking"
    fingerprint = "speaking"
    capabilities = frozenset({"generate", "tools", "score"})

    def __init__(self, *pieces: Piece | Exception) -> None:
        self.pieces, self.asked, self.closed = pieces, list[Prompt](), 0

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        text, calls = "", ()
        async for piece in self.stream(prompt, decoding):
            text += piece.text
            calls += tuple(
                ToolCall(id=one.id, name=one.name, arguments=one.arguments)
                for one in piece.tool_calls
            )
        return Reply(text, "stop", Usage(3, 4), calls, (TokenLogprob(SENTINEL, -1.0),))

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self.asked.append(prompt)
        try:
            for piece in self.pieces:
                await asyncio.sleep(0)
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed += 1


class Mind(GuardMind):
    """Judges by functions."""

    fingerprint = "mind"
    refusals = ("No.",)

    def __init__(self, before: Any = None, after: Any = None, reads: Any = "whole") -> None:
        self._before, self._after, self.reads = before, after, reads

    def before(self, prompt: Prompt) -> Judged:
        return None if self._before is None else self._before(prompt)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        return None if self._after is None else self._after(prompt, answer)


def breaks(*_: Any) -> Judged:
    raise ValueError(f"cannot judge {SENTINEL}")


def streamed(system: Any, prompt: Prompt) -> tuple[str, str | None]:
    async def run() -> tuple[str, str | None]:
        pieces = [piece async for piece in system.stream(prompt, DECODING)]
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        return "".join(piece.text for piece in pieces), pieces[-1].finish

    return asyncio.run(run())


def every_way(system: Any, prompt: Prompt) -> tuple[str, str]:
    """Text and finish, which must be the same in a batch, whole and streamed."""
    batch = system.replies([prompt], DECODING)[0]
    whole = asyncio.run(system.respond(prompt, DECODING))
    assert (batch.text, batch.finish) == (whole.text, whole.finish) == streamed(system, prompt)
    return whole.text, whole.finish


def test_pictures_do_not_pass_and_tools_are_judged_as_text() -> None:
    plain = Prompt.ask("Who?")
    picture = ImagePart.model_validate({"source": b"GIF89a"})
    seen = Prompt((Message(role="user", content=(picture,)),))
    offered = Prompt(plain.messages, tools=(Tool(name="look_up"),))
    guarded = GuardedSystem(Open(), GuardMind(), "guarded")
    refused = NoAnswer("the guard judges texts, not pictures")
    assert guarded.generate([plain, seen, offered], DECODING) == ["Ada", refused, "Ada"]
    with pytest.raises(Unanswered, match="not pictures"):
        asyncio.run(guarded.respond(seen, DECODING))
    with pytest.raises(Unanswered, match="not pictures"):
        streamed(guarded, seen)


def test_it_is_a_system_and_answers_many_at_once() -> None:
    guarded = GuardedSystem(Speaking(), Mind(), "guarded")
    assert isinstance(guarded, System)
    assert isinstance(guarded, Responder)
    assert guarded.capabilities == {"generate", "tools"}, "scores went through a guard"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, ("Ada", "stop")),
        (lambda _: Refuse("No!"), ("No!", "content_filter")),
        (lambda _: Say("Nobody."), ("Nobody.", "stop")),
        (lambda prompt: Forward(Prompt.ask("else")), ("Ada", "stop")),
        (lambda prompt: Forward(prompt, Scripted(lambda _: "Bo")), ("Bo", "stop")),
        (breaks, ("No.", "content_filter")),
    ],
)
def test_what_becomes_of_a_prompt(before: Any, expected: tuple[str, str]) -> None:
    assert every_way(GuardedSystem(Open(), Mind(before), "g"), Prompt.ask("Who?")) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda *_: Refuse("No!"), ("No!", "content_filter")),
        (lambda *_: Say("Nobody."), ("Nobody.", "stop")),
        (lambda _, answer: None if answer == "Ada" else Refuse("?"), ("Ada", "stop")),
        (breaks, ("No.", "content_filter")),
    ],
)
@pytest.mark.parametrize("reads", ["whole", "sentences"])
def test_what_becomes_of_an_answer(after: Any, expected: tuple[str, str], reads: str) -> None:
    guarded = GuardedSystem(Open(), Mind(after=after, reads=reads), "g")
    assert every_way(guarded, Prompt.ask("Who?")) == expected


def test_what_is_rewritten_is_what_the_system_is_asked() -> None:
    inner = Scripted(lambda prompt: prompt.messages[-1].text)
    added = Mind(lambda prompt: Forward(Prompt((*prompt.messages, *Prompt.ask("and").messages))))
    outer = GuardedSystem(GuardedSystem(inner, added, "inner"), Mind(), "outer")
    assert every_way(outer, Prompt.ask("Who?")) == ("and", "stop")
    assert len(inner.prompts[0].messages) == 2
    assert outer.taken_off()[1].taken_off()[1] is inner  # type: ignore[attr-defined]


class Yes(BaseModel):
    harmful: bool


def asking(judge: System, form: type[BaseModel] | None = Yes) -> Any:
    def judged(prompt: Prompt, answer: str = "") -> Any:
        found = yield Consult(judge, Prompt.ask(f"Harmful? {answer}"), DECODING, form)
        harmful = found.harmful if form else found == "yes"
        return Refuse("No!") if harmful else None

    return judged


def test_whom_a_guard_consults_is_asked_in_one_batch() -> None:
    judge = Scripted(lambda prompt: f'{{"harmful": {str("Bo" in str(prompt)).lower()}}}')
    inner = Scripted({"A": "It is Al.", "B": "It is Bo.", "C": "It is Cy."})
    guarded = GuardedSystem(inner, Mind(after=asking(judge)), "g")
    asks = [Prompt.ask(letter) for letter in "ABC"]
    assert guarded.generate(asks, DECODING) == ["It is Al.", "No!", "It is Cy."]
    assert judge.calls == 1
    assert every_way(guarded, asks[0]) == ("It is Al.", "stop")
    assert every_way(guarded, asks[1]) == ("No!", "content_filter")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "judge",
    [
        Scripted(lambda _: f"perhaps {SENTINEL}"),  # no JSON of this form
        Scripted(lambda _: NoAnswer(SENTINEL)),
        Scripted(lambda _: RunError(SENTINEL)),
        Role("guard", Scripted(lambda _: '{"harmful": false}'), RoleOptions(tokens=1)),
    ],
)
def test_a_judge_that_gives_no_verdict_is_a_refusal(
    judge: System, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    mind = Mind(**{place: asking(judge)})
    with caplog.at_level(logging.DEBUG):
        assert every_way(GuardedSystem(Open(), mind, "g"), Prompt.ask(SENTINEL)) == (
            "No.",
            "content_filter",
        )
    assert "g' failed" in caplog.text
    assert SENTINEL not in caplog.text


def test_no_answer_is_no_text_and_may_be_caught() -> None:
    silent = Scripted(lambda _: NoAnswer("gone"))
    guarded = GuardedSystem(Open(), Mind(asking(silent, None)), "g")
    assert every_way(guarded, Prompt.ask("Who?")) == ("No.", "content_filter")

    def catches(prompt: Prompt) -> Any:
        try:
            yield Consult(silent, prompt)
        except Unanswered:
            return Say("Nobody knows.")

    guarded = GuardedSystem(Open(), Mind(catches), "g")
    assert every_way(guarded, Prompt.ask("Who?")) == ("Nobody knows.", "stop")


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_judgement_that_takes_too_long_is_a_refusal(place: str) -> None:
    def slow(*_: Any) -> Judged:
        time.sleep(0.2)
        return None

    guarded = GuardedSystem(Open(), Mind(**{place: slow}), "g", timeout_seconds=0.02)
    reply = asyncio.run(guarded.respond(Prompt.ask("Who?"), DECODING))
    assert (reply.text, reply.finish) == ("No.", "content_filter")
    assert streamed(guarded, Prompt.ask("Who?")) == ("No.", "content_filter")


def test_words_of_a_failure_are_judged_too(caplog: pytest.LogCaptureFixture) -> None:
    forbids = Mind(after=lambda _, text: Refuse("No!") if SENTINEL in text else None)
    prompt = Prompt.ask("Who?")
    for error in (Unanswered(f"no: {SENTINEL}."), OSError(SENTINEL), RuntimeError(SENTINEL)):
        guarded = GuardedSystem(Speaking(error), forbids, "g")  # type: ignore[arg-type]
        with caplog.at_level(logging.DEBUG):
            for asked in (
                guarded.respond(prompt, DECODING),
                _all(guarded.stream(prompt, DECODING)),
            ):
                with pytest.raises(Unanswered, match="gave no answer") as told:
                    asyncio.run(asked)  # type: ignore[arg-type]
                assert told.value.__cause__ is None
                assert SENTINEL not in str(told.value)
    assert SENTINEL not in caplog.text
    guarded = GuardedSystem(Speaking(Unanswered("too long.")), forbids, "g")  # type: ignore[arg-type]
    with pytest.raises(Unanswered, match="too long"):
        asyncio.run(guarded.respond(prompt, DECODING))
    batch = GuardedSystem(Scripted([NoAnswer(SENTINEL), NoAnswer("too long")]), forbids, "g")
    found = batch.generate([prompt, prompt], DECODING)
    assert found == [NoAnswer("what is guarded gave no answer"), NoAnswer("too long")]


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def test_an_answer_that_breaks_off_has_no_end() -> None:
    guarded = GuardedSystem(Speaking(Piece("Half ")), Mind(), "g")  # type: ignore[arg-type]
    with pytest.raises(Unanswered, match="broke off"):
        streamed(guarded, Prompt.ask("Who?"))


def test_calls_are_judged_and_come_with_the_last_piece() -> None:
    arguments = ['{"who": "Zanz', 'ibar Qu\\u0069llfeather"}']
    calls = (
        Piece("", tool_calls=(ToolCallPiece(0, "one", "look_up", arguments[0]),)),
        Piece("", "tool_calls", Usage(1, 2), (ToolCallPiece(0, arguments=arguments[1]),)),
    )
    inner = Speaking(*calls)
    prompt = Prompt.ask("Who?")
    passed = asyncio.run(_all(GuardedSystem(inner, Mind(), "g").stream(prompt, DECODING)))  # type: ignore[arg-type]
    assert passed == [
        Piece(
            "",
            "tool_calls",
            Usage(1, 2),
            (ToolCallPiece(0, "one", "look_up", "".join(arguments)),),
        )
    ]
    forbids = Mind(after=lambda _, text: Refuse("No!") if SENTINEL in text else None)
    stopped = asyncio.run(_all(GuardedSystem(inner, forbids, "g").stream(prompt, DECODING)))  # type: ignore[arg-type]
    assert stopped == [Piece("No!", "content_filter", Usage(1, 2), withheld_by="g")]


def test_log_probabilities_do_not_pass() -> None:
    inner = Speaking(
        Piece("Ada", logprobs=(TokenLogprob(SENTINEL, -1.0),)),
        Piece("", "stop", logprobs=(TokenLogprob(SENTINEL, -1.0),)),
    )
    guarded = GuardedSystem(inner, Mind(), "g")  # type: ignore[arg-type]
    reply = asyncio.run(guarded.respond(Prompt.ask("Who?"), DECODING))
    assert (reply.text, reply.logprobs, reply.usage) == ("Ada", None, Usage(3, 4))
    pieces = asyncio.run(_all(guarded.stream(Prompt.ask("Who?"), DECODING)))
    assert all(piece.logprobs == () for piece in pieces)


def test_a_stream_that_is_closed_or_turns_bad_ends_what_it_guards() -> None:
    inner = Speaking(Piece("One. "), Piece("Two. "), Piece("Three.", "stop"))

    async def first() -> None:
        guarded = GuardedSystem(inner, Mind(reads="sentences"), "g")  # type: ignore[arg-type]
        pieces = guarded.stream(Prompt.ask("Who?"), DECODING)
        assert (await anext(pieces)).text == "One. "
        await pieces.aclose()  # type: ignore[attr-defined]
        assert inner.closed == 1

    asyncio.run(first())
    bad = Mind(after=lambda _, text: Refuse("No!") if "Two" in text else None, reads="sentences")
    guarded = GuardedSystem(inner, bad, "g")  # type: ignore[arg-type]
    assert streamed(guarded, Prompt.ask("Who?")) == ("One. \n\nNo!", "content_filter")
    assert inner.closed == 2


def test_a_request_keeps_the_guard_that_it_began_with() -> None:
    inner = Speaking(Piece("One. "), Piece("Two. "), Piece("Three.", "stop"))
    guarded = GuardedSystem(inner, Mind(reads="sentences"), "g")  # type: ignore[arg-type]

    async def run() -> str:
        pieces = guarded.stream(Prompt.ask("Who?"), DECODING)
        text = (await anext(pieces)).text
        guarded.mind = Mind(after=lambda *_: Refuse("No!"))
        return text + "".join([piece.text async for piece in pieces])

    assert asyncio.run(run()) == "One. Two. Three."
    assert streamed(guarded, Prompt.ask("Who?")) == ("No!", "content_filter")


def test_a_check_asks_nobody() -> None:
    inner = Scripted([])
    mind = Mind(lambda prompt: Refuse("No!") if "bad" in str(prompt) else None, lambda *_: Say("!"))
    guarded = GuardedSystem(inner, mind, "g")

    async def run() -> None:
        assert await guarded.check(Prompt.ask("bad")) == Refuse("No!")
        assert await guarded.check(Prompt.ask("good")) is None
        assert await guarded.check(Prompt.ask("good"), "an answer") == Say("!")

    asyncio.run(run())
    assert inner.prompts == []
