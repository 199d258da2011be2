"""Telling that long work goes on: one callback for every stage, and when a plain log tells it.

Sentences go to the log (the standard library's, one logger per module, all below ``delible``).
Whoever shows them to people opens :func:`shown`; what only matters as a detail of other work is
told :func:`aside`, what belongs to a larger step :func:`indented`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

#: Called as ``stage(title, done, total)``; a new title is a new stage.
Stage = Callable[[str, int, int], None]
#: Called as ``steps(step, total, numbers)`` after every step of training.
Steps = Callable[[int, int, Mapping[str, float]], None]
Parts = TypeVar("Parts", bound=Sequence[Any])

#: Work that takes less is not worth a word.
SECONDS_UNTOLD = 5.0
#: A piece that took less was there already.
SECONDS_KNOWN = 1.0
#: In a plain log, work that goes on is told again no sooner than this.
SECONDS_BETWEEN_LINES = 20.0


#: What stands before sentences that are shown; ``None``: they are not shown.
_before: ContextVar[str | None] = ContextVar("before", default="")


@contextmanager
def indented(by: str = "   ") -> Iterator[None]:
    """Sentences that are told inside are shown further to the right."""
    before = _before.get()
    token = _before.set(None if before is None else before + by)
    try:
        yield
    finally:
        _before.reset(token)


@contextmanager
def aside() -> Iterator[None]:
    """Sentences that are told inside are logged, but :func:`shown` does not show them."""
    token = _before.set(None)
    try:
        yield
    finally:
        _before.reset(token)


class _Shown(logging.Handler):
    """Hands every sentence to whoever shows it; what goes wrong there goes wrong here."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        before = _before.get()
        if before is not None:
            self._show(before + record.getMessage())


@contextmanager
def shown(show: Callable[[str], None]) -> Iterator[None]:
    """Shows what delible logs, from INFO on, and nowhere else: each sentence once.

    Args:
        show: Receives one sentence at a time.
    """
    logger = logging.getLogger("delible")
    level, propagate = logger.level, logger.propagate
    handler = _Shown(show)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library below may have given the root logger a handler
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def unwatched(title: str, done: int, total: int) -> None:
    """Tells nobody."""


def watched(parts: Iterable[Parts], title: str, total: int, stage: Stage) -> Iterator[Parts]:
    """Passes parts of some work on, and tells how many of its items are done.

    Work that is over within a few seconds is never told.

    Args:
        parts: Such as batches; a part counts as done when the next one is asked for.
        total: Items of all parts.
    """
    began, done, told = time.monotonic(), 0, False
    for part in parts:
        yield part
        done += len(part)
        if told or time.monotonic() - began >= SECONDS_UNTOLD:
            told = True
            stage(title, done, total)


def duration(seconds: float) -> str:
    """A time in words, such as "40 s" or "3 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Pace:
    """When a plain log tells of work that goes on, and how long it will take.

    Args:
        done: What is done already, and took no time here.
    """

    def __init__(self, done: int = 0) -> None:
        self._began = self._told = time.monotonic()
        self._first = self._last = done

    def due(self) -> bool:
        """Whether the last line is long enough ago."""
        return time.monotonic() - self._told >= SECONDS_BETWEEN_LINES

    def goes_on(self, done: int) -> bool:
        """Whether this is still the same work: less is never done than before."""
        same, self._last = done >= self._last, done
        return same

    def told(self) -> None:
        """A line was written."""
        self._told = time.monotonic()

    def left(self, done: int, total: int) -> str:
        """Such as "40 s left"; empty while no speed is known, and at the end."""
        if not self._first < done < total:
            return ""
        spent = time.monotonic() - self._began
        return f"{duration(spent / (done - self._first) * (total - done))} left"


class Remaining:
    """How long the rest of some pieces takes, of which a few may be known from before."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._spent, self._pieces = 0.0, 0

    def after(self, pieces: int, rest: int) -> str:
        """Words such as "; 3 min left", after so many more pieces.

        Pieces that took next to no time were there already: they say nothing about the others.
        """
        now = time.monotonic()
        taken, self._last = now - self._last, now
        if taken >= SECONDS_KNOWN:
            self._spent, self._pieces = self._spent + taken, self._pieces + pieces
        if not rest or not self._pieces:
            return ""
        return f"; {duration(self._spent / self._pieces * rest)} left"


__all__ = [
    "Pace",
    "Remaining",
    "Stage",
    "Steps",
    "aside",
    "duration",
    "indented",
    "shown",
    "unwatched",
    "watched",
]
