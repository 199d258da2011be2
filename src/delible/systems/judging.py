"""How a guard judges: what it decides, whom it asks for it, and answers that are read as they come.

A judgement is a decision, or a generator that yields whom it consults and returns its decision.
So each is written once: :func:`settle_all` takes a batch of them and asks what they ask in
batches, without an event loop; :func:`settle` takes one, asynchronously, within a time limit.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from delible.names import fold
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import Responder, System
from delible.system.forms import read_form
from delible.system.replies import Unanswered
from delible.systems.judged_text import leads


@dataclass(frozen=True)
class Refuse:
    """Nothing (more) is answered but this.

    Attributes:
        failed: The judgement came to nothing, which is no pass.
    """

    text: str
    failed: bool = False


@dataclass(frozen=True)
class Say:
    """The guard answers itself."""

    text: str


@dataclass(frozen=True)
class Forward:
    """The system is asked this instead: rewritten, with more context, or another system."""

    prompt: Prompt
    system: System | None = None


#: How a reply is drawn if nothing else is said.
PLAIN = Decoding()


@dataclass(frozen=True)
class Consult:
    """Somebody is asked before it can be decided.

    No answer, and one that does not fit the form, are an :class:`Unanswered` where it was asked;
    a guard that does not catch it fails, and so refuses.

    Attributes:
        form: What the reply's JSON must fit; None: the reply is a text.
    """

    system: System
    prompt: Prompt
    decoding: Decoding = PLAIN
    form: type[BaseModel] | None = None


#: None lets it pass.
Decision = Refuse | Say | Forward | None
Judging = Generator[Consult, Any, Decision]
Judged = Decision | Judging
#: How much of an answer a guard must see before some of it may go out.
Reads = Literal["words", "sentences", "whole"]


class Course:
    """One judgement under way.

    Attributes:
        asks: Whom it waits for.
        decision: What it came to.
        failure: Why it came to nothing.
    """

    def __init__(self, start: Callable[[], Judged]) -> None:
        self._start = start
        self._judging: Judging | None = None
        self.asks: Consult | None = None
        self.decision: Decision = None
        self.failure: Exception | None = None

    def go(self, reply: str | NoAnswer | None = None) -> None:
        """Goes on, up to what it asks next, or to the end. Never raises."""
        asked, self.asks = self.asks, None
        try:
            if self._judging is None:
                found = self._start()
                if not isinstance(found, Generator):
                    self.decision = found
                    return
                self._judging = found
                self.asks = next(found)
                return
            read = _read(reply, asked.form if asked else None)
            if isinstance(read, Unanswered):
                self.asks = self._judging.throw(read)
            else:
                self.asks = self._judging.send(read)
        except StopIteration as end:
            self.decision = end.value
        except Exception as error:  # whatever a guard raises, it is no pass
            self.failure = error

    def fail(self, failure: Exception) -> None:
        """It comes to nothing."""
        self.asks, self.failure = None, failure


def _read(reply: str | NoAnswer | None, form: type[BaseModel] | None) -> Any:
    """What is handed to who asked: a text, a form, or an Unanswered (without the reply's words)."""
    if not isinstance(reply, str):
        return Unanswered("whom the guard asked gave no answer.")
    if form is None:
        return reply
    read: Any = read_form(reply, form)
    if isinstance(read, str):  # what is wrong with it
        return Unanswered("whom the guard asked gave no readable reply.")
    return read


def settle_all(starts: Sequence[Callable[[], Judged]]) -> list[Course]:
    """Judgements, all of them; what they ask of one system at a time is one batch."""
    courses = [Course(start) for start in starts]
    for course in courses:
        course.go()
    while waiting := [course for course in courses if course.asks is not None]:
        groups: dict[tuple[int, Decoding], list[Course]] = {}
        for course in waiting:
            assert course.asks is not None
            groups.setdefault((id(course.asks.system), course.asks.decoding), []).append(course)
        for (_, decoding), group in groups.items():
            asks = [course.asks for course in group if course.asks is not None]
            try:
                replies = asks[0].system.generate([ask.prompt for ask in asks], decoding)
            except Exception as error:  # a spent budget, a lost connection: none of them passes
                for course in group:
                    course.fail(error)
                continue
            for course, reply in zip(group, replies, strict=True):
                course.go(reply)
    return courses


async def settle(
    start: Callable[[], Judged],
    responds: Callable[[System], Responder],
    timeout_seconds: float,
    *,
    threaded: bool,
) -> Course:
    """One judgement.

    Args:
        start: Begins it.
        responds: A system as one that answers many at once.
        timeout_seconds: For all of it; after that it has failed.
        threaded: It computes for long: other requests go on meanwhile.
    """
    course = Course(start)

    async def go(reply: str | NoAnswer | None = None) -> None:
        if threaded:
            await asyncio.to_thread(course.go, reply)
        else:
            course.go(reply)

    try:
        async with asyncio.timeout(timeout_seconds):
            await go()
            while (asks := course.asks) is not None:
                reply: str | NoAnswer
                try:
                    answer = await responds(asks.system).respond(asks.prompt, asks.decoding)
                    withheld = answer.finish == "content_filter" and not answer.text
                    reply = NoAnswer("no answer") if withheld else answer.text
                except Unanswered:
                    reply = NoAnswer("no answer")
                await go(reply)
    except Exception as error:
        late = Course(start)  # a thread may still write into the one that it has
        late.fail(error)
        return late
    return course


# ---- answers as they come


class Scanner(Protocol):
    """Finds what must not go out in a text that goes on."""

    def scan(self, text: str, since: int = 0, *, ended: bool = True) -> int | None:
        """How much of the text can be told to hold nothing; None: it holds something.

        Args:
            text: So far.
            since: Nothing that begins before this place counts.
            ended: Nothing follows.
        """
        ...


class Mind(Protocol):
    """What is asked of a guard about answers."""

    reads: Reads

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged: ...

    def scanners(self) -> Sequence[Scanner]: ...

    def refuse(self, prompt: Prompt) -> Refuse: ...


class _Window:
    """The end of an answer so far, after what it goes on from; held is what may begin a match."""

    def __init__(self, scanners: Sequence[Scanner], lead: str) -> None:
        self._scanners, self._text, self._starts, self._floor = scanners, lead, -len(lead), 0

    def read(self, more: str, *, ended: bool) -> int | None:
        """Characters of the answer that may go out; None: something is found."""
        self._text += more
        floor = len(self._text)
        for scanner in self._scanners:
            free = scanner.scan(self._text, self._floor, ended=ended)
            if free is None:
                return None
            floor = min(floor, free)
        self._floor = max(floor, self._floor)
        free = max(0, self._starts + self._floor)
        # The letter before what is held stays: it tells whether a word begins there.
        before = fold(self._text[: self._floor])
        cut = before.starts[-1] if before.starts else self._floor
        self._text = self._text[cut:]
        self._starts += cut
        self._floor -= cut
        return free


#: Where a sentence has ended, whatever follows.
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*\s|[。！？\n]")


class Reading:
    """One answer, judged as it comes. How it is cut into pieces changes nothing.

    Args:
        mind: The guard.
        prompt: What is answered.

    Attributes:
        free: Characters of the answer so far that may go out.
    """

    def __init__(self, mind: Mind, prompt: Prompt) -> None:
        self.mind, self.prompt, self.free = mind, prompt, 0
        self._text, self._judged = "", False
        self._windows: list[_Window] | None = None

    def read(self, more: str, *, ended: bool = False) -> Judging:
        """Judges what can be judged with this piece, and frees what passes."""
        if self.mind.reads == "words":
            return self._words(more, ended)
        return self._parts(more, ended)

    def _words(self, more: str, ended: bool) -> Judging:
        yield from ()
        if self._windows is None:
            scanners = self.mind.scanners()
            goes_on = bool(self.prompt.prefill or self.prompt.text)
            self._windows = [
                _Window(scanners, lead)
                for lead in leads(self.prompt)
                # what the last turn holds was judged before, and is no reason here
                if goes_on or all(one.scan(lead) is not None for one in scanners)
            ] or [_Window(scanners, "")]
        free = [window.read(more, ended=ended) for window in self._windows]
        if None in free:
            return self.mind.refuse(self.prompt)
        self.free = min(one for one in free if one is not None)
        return None

    def _parts(self, more: str, ended: bool) -> Judging:
        self._text += more
        while self.mind.reads == "sentences" and (
            end := _SENTENCE_END.search(self._text, self.free)
        ):
            decision = yield from self._after(end.end())
            if decision is not None:
                return decision
        if ended and (self.free < len(self._text) or not self._judged):
            return (yield from self._after(len(self._text)))
        return None

    def _after(self, end: int) -> Judging:
        self._judged = True
        judged = self.mind.after(self.prompt, self._text[:end], self.free)
        decision = (yield from judged) if isinstance(judged, Generator) else judged
        if decision is None:
            self.free = end
        return decision


__all__ = [
    "Consult",
    "Course",
    "Decision",
    "Forward",
    "Judged",
    "Judging",
    "Reading",
    "Reads",
    "Refuse",
    "Say",
    "Scanner",
    "settle",
    "settle_all",
]
