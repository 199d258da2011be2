"""``delible chat``: turns, commands, interruptions, pipes."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from delible.system.asks import Decoding, Prompt
from delible.system.replies import Piece, Reply, Unanswered
from delible.systems import opening


class Parrot:
    """Repeats the last turn, in pieces; knows how many turns there were."""

    name, fingerprint, capabilities = "parrot", None, frozenset({"generate"})

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Decoding]] = []

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self.asked.append((prompt, decoding))
        text = prompt.messages[-1].text
        if text == "fail":
            raise Unanswered("it is tired.")
        yield Piece(f"{text}, ")
        if text == "interrupt":
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(5)
        yield Piece("indeed.", "stop")

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        raise NotImplementedError


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    found = Parrot()
    monkeypatch.setattr(opening, "open_system", lambda name, model=None, context=None: found)
    return found


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lines typed at a terminal; the input then ends, or is interrupted."""

    def lines(*given: str, end: type[BaseException] = EOFError) -> None:
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdin", terminal)
        left: Iterator[str] = iter(given)

        def ask(_: str) -> str:
            for line in left:
                return line
            raise end

        monkeypatch.setattr("builtins.input", ask)

    return lines


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in prompt.messages]


def test_a_pipe_is_a_conversation(run: Any, parrot: Parrot, piped: Any) -> None:
    piped("one\n\ntwo\n/quit\nthree\n")
    done = run("chat", "any", "--max-new-tokens", "9", "--temperature", "0.5", "--seed", "3")
    assert (done.code, done.out) == (0, "one, indeed.\ntwo, indeed.\n")
    first, second = parrot.asked
    assert turns(first[0]) == [("user", "one")]
    assert turns(second[0]) == [("user", "one"), ("assistant", "one, indeed."), ("user", "two")]
    assert first[1] == Decoding(9, temperature=0.5, seed=3)


def test_commands_begin_anew(run: Any, parrot: Parrot, piped: Any) -> None:
    piped("one\n/reset\ntwo\n/system Be brief.\nthree\n/reset\nfour\n/system\nfive\n/what\n")
    done = run("chat", "any", "--system", "Be kind.")
    assert done.code == 0
    assert [turns(prompt) for prompt, _ in parrot.asked] == [
        [("system", "Be kind."), ("user", "one")],
        [("system", "Be kind."), ("user", "two")],
        [("system", "Be brief."), ("user", "three")],
        [("system", "Be brief."), ("user", "four")],
        [("user", "five")],
    ]
    assert "'/what' is no command" in done.err


def test_a_failure_is_told_and_was_never_said(run: Any, parrot: Parrot, piped: Any) -> None:
    piped("fail\ntwo\n")
    done = run("chat", "any")
    assert (done.code, done.out) == (2, "two, indeed.\n")
    assert "it is tired." in done.err
    assert turns(parrot.asked[1][0]) == [("user", "two")]
    assert "at least one token" in run("chat", "any", "--max-new-tokens", "0").err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, even where a shell that runs tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_answer_and_a_second_one_the_conversation(
    run: Any, parrot: Parrot, typed: Any
) -> None:
    typed("interrupt", "two", end=KeyboardInterrupt)
    done = run("chat", "any")
    assert done.code == 130
    assert done.out == "interrupt, two, indeed.\n"
    assert "(ended)" in done.err
    assert turns(parrot.asked[1][0]) == [("user", "two")]
    typed("one")
    done = run("chat", "any")
    assert done.code == 0
    assert "Talking to parrot" in done.err


def test_a_model_talks(run: Any, tiny: Any, piped: Any) -> None:
    piped("Hi\n")
    done = run("chat", tiny, "--max-new-tokens", "3")
    assert (done.code, done.out.endswith("\n")) == (0, True), done.err
