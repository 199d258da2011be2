"""Guards: refuse what is forgotten, give no scores, fail closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast
from unittest import mock

from delible.records import ForgetRequest
from delible.system.asks import (
    Decoding,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.base import BlackBox
from delible.system.replies import Piece, Reply
from delible.systems.guarded import Guard, GuardedSystem, GuardMind
from delible.systems.judging import Course, Decision, Refuse, Say, settle_all
from delible.testing.contract.trial import (
    FORGET,
    REQUEST,
    RETAIN,
    ContractError,
    Trial,
    require,
)

_SPOKEN = "The model has spoken."


class _Speaker(BlackBox):
    """A system that says one sentence, in pieces, and counts how often it was asked."""

    name, fingerprint = "speaker", "speaker"
    capabilities = frozenset({"generate", "score"})

    def __init__(self, says: str = _SPOKEN, size: int = 5) -> None:
        self.asked, self.says, self.size = 0, says, size
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        self.prompts += prompts
        return [self.says for _ in prompts]

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        self.asked += 1
        return Reply(self.says)

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self.asked += 1
        for start in range(0, len(self.says), self.size):
            yield Piece(self.says[start : start + self.size])
        yield Piece("", "stop")

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        raise ContractError("the guarded system was asked for scores")


class _Told(logging.Handler):
    """Remembers what was logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {record.exc_info}")

    def holds(self, text: str) -> bool:
        """Whether it was told."""
        return any(text in line for line in self.lines)


def _every_way(guarded: GuardedSystem, prompt: Prompt) -> dict[str, Reply]:
    """The reply in a batch, whole and streamed."""

    async def streamed() -> Reply:
        pieces = [piece async for piece in guarded.stream(prompt, Decoding(4))]
        require(pieces and pieces[-1].finish is not None, "a stream has no end")
        return Reply("".join(piece.text for piece in pieces), pieces[-1].finish or "stop")

    batch = guarded.replies([prompt], Decoding(4))[0]
    require(isinstance(batch, Reply), "a prompt that is a text has no answer")
    return {
        "batch": cast(Reply, batch),
        "whole": asyncio.run(guarded.respond(prompt, Decoding(4))),
        "streamed": asyncio.run(streamed()),
    }


def _mind(trial: Trial, request: ForgetRequest = REQUEST) -> GuardMind:
    # guards that look into a model look into one of the family
    return cast(Guard, trial.component).prepare(request, replace(trial.context, itself=trial.lm()))


def _raising(mind: GuardMind, prompt: Prompt, course: Course) -> Decision:
    """What a judgement came to, or why it came to nothing."""
    if course.failure is not None:
        raise course.failure
    return course.decision


def guard_refuses_what_is_forgotten(trial: Trial) -> None:
    """Each forget question or its answer is refused, or asked otherwise; small talk is answered."""
    mind, other = _mind(trial), _mind(trial)
    for record in FORGET:
        prompt = Prompt.ask(record.question)
        speaker = _Speaker(record.answer)
        guarded = GuardedSystem(speaker, mind, "guarded")
        caught = str(guarded.generate([prompt], Decoding(4))[0])
        refused = caught != record.answer
        otherwise = bool(speaker.prompts) and speaker.prompts != [prompt]
        require(refused or otherwise, f"neither '{record.question}' nor its answer is caught")
        require(not refused or record.answer not in caught, "the refusal tells the answer")
        one, two = settle_all([partial(mind.before, prompt), partial(other.before, prompt)])
        require(one.decision == two.decision, "two minds of one request judge differently")
    small_talk = Prompt.ask("How do I boil an egg?")
    guarded = GuardedSystem(_Speaker("In hot water."), mind, "guarded")
    require(
        guarded.generate([small_talk], Decoding(4)) == ["In hot water."], "small talk is refused"
    )
    odd = [Prompt(), Prompt(text=""), Prompt.ask("?" * 5000), Prompt.ask("\u200b\ud7ff")]
    with mock.patch.object(guarded, "_decision", _raising):
        guarded.generate(odd, Decoding(4))


def guard_gives_no_scores(trial: Trial) -> None:
    """Behind a guard nothing white-box is left, and a refused prompt reaches no system."""
    speaker = _Speaker()
    guarded = GuardedSystem(speaker, _mind(trial), "guarded")
    require(guarded.capabilities == {"generate"}, "the guarded system has more than 'generate'")
    prompts = [Prompt.ask(record.question) for record in FORGET]
    try:
        guarded.score([Score(prompts[0], "Norrby")])
    except TypeError:
        pass
    else:
        raise ContractError("the guarded system gives scores")
    replies = guarded.generate(prompts, Decoding(4))
    courses = settle_all([partial(guarded.mind.before, prompt) for prompt in prompts])
    refused = sum(isinstance(course.decision, Refuse | Say) for course in courses)
    require(len(replies) == len(prompts), "answers are missing")
    require(speaker.asked == len(prompts) - refused, "a refused prompt reached the system")


def guard_fails_closed(trial: Trial) -> None:
    """Where a judgement breaks down, the system's answer is not let through, nor is it told."""
    mind = _mind(trial)
    prompt = Prompt.ask("How do I boil an egg?")
    for verb in ("before", "after"):
        asked = "scanners" if verb == "after" and mind.reads == "words" else verb
        told = _Told()
        logging.getLogger("delible").addHandler(told)
        with mock.patch.object(type(mind), asked, side_effect=RuntimeError(_SPOKEN)):
            try:
                replies = _every_way(GuardedSystem(_Speaker(), mind, "guarded"), prompt)
            finally:
                logging.getLogger("delible").removeHandler(told)
        for way, reply in replies.items():
            passed = _SPOKEN in reply.text or reply.finish != "content_filter"
            require(not passed, f"with a broken '{verb}' the answer comes through ({way})")
        require(not told.holds(_SPOKEN), "what a broken judgement was about is in the log")


def guard_streams_what_it_answers(trial: Trial) -> None:
    """In a batch, whole, and streamed in pieces of any size: one verdict; what passes is equal."""
    mind = _mind(trial)
    for record in (*FORGET, *RETAIN):
        for answer in (record.answer, f"It is, as I said: {record.answer}. That is all."):
            for size in (1, 3, 100):
                speaker = _Speaker(answer, size)
                guarded = GuardedSystem(speaker, mind, "guarded")
                for prompt in (Prompt.ask(record.question), Prompt.ask("How is it called?")):
                    ways = _every_way(guarded, prompt)
                    finishes = {way: reply.finish for way, reply in ways.items()}
                    require(len(set(finishes.values())) == 1, f"verdicts differ: {finishes}")
                    streamed, whole = ways["streamed"].text, ways["whole"].text
                    same = streamed == whole or (
                        ways["whole"].finish == "content_filter" and streamed.endswith(whole)
                    )
                    require(same, "what is streamed is another answer than the whole one")


def guard_changes_the_fingerprint(trial: Trial) -> None:
    """Cached answers belong to one guard and one request."""
    mine, again = _mind(trial).fingerprint, _mind(trial).fingerprint
    require(mine == again, "two minds of one request have two fingerprints")
    smaller = REQUEST.model_copy(update={"forget": FORGET[2:], "subjects": ("Ben Orr",)})
    require(mine != _mind(trial, smaller).fingerprint, "another request has the same fingerprint")
    guarded = GuardedSystem(_Speaker(), _mind(trial), "guarded").fingerprint
    require(guarded not in (None, "speaker"), "the guarded system is cached as the bare one")
