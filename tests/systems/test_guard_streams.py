"""However an answer is cut into pieces: the same verdict, and nothing forbidden on the way."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from delible.names import Names, Runs, fold, runs
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.system.replies import Piece, Reply, ToolCallPiece
from delible.systems.guarded import GuardedSystem, GuardMind
from delible.systems.judging import Reading, Refuse, Scanner, settle_all
from delible.systems.withholding import BREAK

TARGETS = ("John Smith", "Ann", "김철수", "J. K. Rowling", "Jörg Ek", "R2D2", "李白", "Al Li")
RUN = "the old keeper lit his lamp again"
REFUSAL = "No."
#: Parts of answers: names, beginnings of them, disguises, what looks like them.
PARTS = (
    "John", "Smith", " ", "\n", "J.", "K.", "Rowling", "Ann", "ual", "Anna", "김철", "수", "김",
    "李", "白", "是", "Jo\u200bhn", "J o h n", "Jörg", "Jo\u0308rg", "Ek", "R2", "D2", "-", "$mith",
    "@", "!", "ſmith", "Al", "Li", "l", "xJohn", "the old keeper", "lit his lamp", "again", "lit",
    "was", ".", "\u1100\u1175\u11b7\u110e\u1165\u11af\u1109\u116e", "J0hn", "½", "ﬁ", "か\u3099",
    "e", "\u0301",
)  # fmt: skip
ANSWERS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 80), max_size=12)
DECODING = Decoding(8)


class Words(GuardMind):
    """Names and a run of words."""

    fingerprint = "words"
    reads = "words"
    threaded = False
    refusals = (REFUSAL,)

    def __init__(self, targets: Sequence[str] = TARGETS) -> None:
        self.names, self.runs = Names(targets), Runs(runs(RUN, 7), 7)

    def scanners(self) -> Sequence[Scanner]:
        return (self.names, self.runs)

    def forbids(self, text: str) -> bool:
        """The plain way, over all of it."""
        return self.names.occur(text) or not runs(RUN, 7).isdisjoint(runs(text, 7))


class Cut(BlackBox):
    """Says a text in pieces."""

    name, fingerprint = "cut", "cut"

    def __init__(self, pieces: Sequence[str], calls: Sequence[str] = ()) -> None:
        self.pieces, self.calls = pieces, calls

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return ["".join(self.pieces)] * len(prompts)

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        return Reply("".join(self.pieces))

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        for text in self.pieces:
            yield Piece(text)
        for place, arguments in enumerate(self.calls):
            name = "" if place else "look_up"
            yield Piece("", tool_calls=(ToolCallPiece(0, str(place), name, arguments),))
        yield Piece("", "stop")


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def told(system: GuardedSystem, prompt: Prompt) -> tuple[list[str], str]:
    async def run() -> tuple[list[str], str]:
        pieces = [piece async for piece in system.stream(prompt, DECODING)]
        return [piece.text for piece in pieces], str(pieces[-1].finish)

    return asyncio.run(run())


MIND = Words()


@settings(max_examples=150, deadline=None)
@given(ANSWERS, CUTS, st.sampled_from(("", "Well, Jo", "xJohn", "Ask John ", "the old ")))
@example("hn Smith", [1, 2, 3], "Jo")
@example("John Smithson", [4, 10], "")
@example("John Smith", [4, 10], "")
@example("김철\u1109\u116e", [3], "")
@example("$mith", [], "John ")
@example("xJ K Rowling.", [2], "")
@example("xJohn Smith", [1], "")
def test_every_cut_gives_one_verdict_and_no_target(
    answer: str, places: list[int], prefill: str
) -> None:
    prompt = Prompt.ask("Who?", prefill=prefill)
    guarded = GuardedSystem(Cut(cut(answer, places)), MIND, "words")
    sent, finish = told(guarded, prompt)
    whole = asyncio.run(guarded.respond(prompt, DECODING))
    bad = MIND.forbids(prefill + answer)
    assert (finish == "content_filter") == bad == (whole.finish == "content_filter")
    assert guarded.replies([prompt], DECODING)[0].finish == whole.finish  # type: ignore[union-attr]
    if not bad:
        assert "".join(sent) == answer == whole.text
        return
    assert whole.text == REFUSAL
    assert sent[-1].removeprefix(BREAK) == REFUSAL
    before = "".join(sent[:-1])
    assert answer.startswith(before)
    assert not MIND.forbids(prefill + before) or MIND.forbids(prefill)
    # Not even the beginning of the first one that occurs.
    first = min(
        (match.start for match in MIND.names.find(prefill + answer)), default=len(prefill + answer)
    )
    assert len(prefill + before) <= max(first, len(prefill))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "disguise", ["{}", "It is {}, I say.", "x {}", "Jo {}\n", "是{}是", "Ann-{}"]
)
def test_every_target_at_every_cut(target: str, disguise: str) -> None:
    """No byte of a target goes out, wherever the answer is cut in two."""
    answer = disguise.format(target)
    mind = Words([target])
    start = min(match.start for match in mind.names.find(answer))
    for place in range(len(answer) + 1):
        sent, finish = told(GuardedSystem(Cut(cut(answer, [place])), mind, "w"), Prompt.ask("Who?"))
        assert finish == "content_filter"
        assert len("".join(sent[:-1])) <= start


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.lists(st.integers(0, 200), max_size=10))
def test_bytes_that_are_cut_within_a_letter(answer: str, places: list[int]) -> None:
    """As a server sends them: bytes, decoded as they come."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    encoded = answer.encode()
    edges = [0, *sorted(place % (len(encoded) + 1) for place in places), len(encoded)]
    pieces = [decoder.decode(encoded[start:end]) for start, end in pairwise(edges)]
    assert "".join(pieces) == answer
    _, finish = told(GuardedSystem(Cut(pieces), MIND, "words"), Prompt.ask("Who?"))
    assert (finish == "content_filter") == MIND.forbids(answer)


@settings(max_examples=60, deadline=None)
@given(ANSWERS, ANSWERS, CUTS)
def test_arguments_of_calls_are_cut_anywhere(answer: str, argument: str, places: list[int]) -> None:
    pieces = cut(argument, places)
    sent, finish = told(GuardedSystem(Cut([answer], pieces), MIND, "words"), Prompt.ask("Who?"))
    bad = MIND.forbids(f"{answer}\nlook_up\n{argument}")
    assert (finish == "content_filter") == bad
    assert not bad or sent[-1].removeprefix(BREAK) == REFUSAL


def test_choices_are_judged_each_for_itself() -> None:
    good, bad = ["Mary ", "Smi", "th"], ["John ", "Smi", "th"]

    async def run() -> list[str]:
        streams = [
            GuardedSystem(Cut(pieces), MIND, "words").stream(Prompt.ask("Who?"), DECODING)
            for pieces in (good, bad, good)
        ]
        texts = [""] * 3
        open_ = dict(enumerate(streams))
        while open_:
            for place, stream in list(open_.items()):
                try:
                    texts[place] += (await anext(stream)).text
                except StopAsyncIteration:
                    del open_[place]
        return texts

    assert asyncio.run(run()) == ["Mary Smith", REFUSAL, "Mary Smith"]


def free_after(text: str, mind: Any = MIND) -> str:
    reading = Reading(mind, Prompt.ask("Who?"))
    settle_all([lambda: reading.read(text)])
    return text[: reading.free]


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("Nobody knows him", "Nobody knows him"),
        ("Ask Jo", "Ask "),
        ("Ask John S", "Ask "),
        ("Ask John, then", "Ask John, then"),
        ("Ask Annu", "Ask Annu"),
        ("Ask Ann", "Ask "),
        ("Yes, the old keeper l", "Yes, "),
        ("Yes, the old keeper sat", "Yes, the old keeper sat"),
        ("是李", "是"),
        ("askJo", "askJo"),
    ],
)
def test_only_what_could_begin_a_target_waits(text: str, free: str) -> None:
    assert free_after(text) == free


@settings(max_examples=100, deadline=None)
@given(ANSWERS, CUTS)
@example("\nSmith\n", [1])
@example("He lit it. Smith was", [4, 11])
def test_sentences_do_not_depend_on_cuts(answer: str, places: list[int]) -> None:
    heard: list[list[str]] = []

    class Sentences(GuardMind):
        fingerprint, reads, threaded, refusals = "s", "sentences", False, (REFUSAL,)

        def after(self, prompt: Prompt, answer: str, since: int = 0) -> Refuse | None:
            heard[-1].append(answer[since:])
            return Refuse(REFUSAL) if "Smith" in answer else None

    verdicts = []
    for pieces in ([answer], cut(answer, places)):
        heard.append([])
        sent, finish = told(GuardedSystem(Cut(pieces), Sentences(), "s"), Prompt.ask("Who?"))
        verdicts.append((finish, "".join(sent)))
        assert finish == "stop" or "Smith" not in "".join(sent)
    assert verdicts[0] == verdicts[1]
    assert heard[0] == heard[1]


def test_a_long_answer_costs_no_more_per_word() -> None:
    """The window stays short, so reading is linear."""
    reading = Reading(MIND, Prompt.ask("Who?"))
    for _ in range(2000):
        settle_all([lambda: reading.read("John went home. ")])
        assert reading._windows is not None
        assert all(len(window._text) < 40 for window in reading._windows)
    assert reading.free == 2000 * len("John went home. ")


def test_trailing_separators_are_told_from_letters() -> None:
    assert [fold(text).trailing for text in ("ab", "ab ", "ab-", "ab\u200b", "")] == [0, 2, 1, 0, 2]
