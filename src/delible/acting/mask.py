"""A filter around an agent's tools, by keyed hashes: it knows what is hidden, and cannot tell it.

A hidden name in a call is put to the tool as a name that nobody has, so the reply is what the tool
says of anything that it does not have. Sentences of results that hold a hidden name are left out.
The action that would complete a hidden sequence is not done; each of its actions alone is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from delible.acting.loop import Action, Tool, canonical
from delible.names import JOINED, fold

#: A name that nobody has.
NOBODY = "Qxzvany"
NOT_NOW = "That cannot be done now."
WORD = re.compile(r"\w+")
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Mask:
    """What is hidden.

    Attributes:
        hashed: The keyed hash of a text.
        names: Hashes of names, as :meth:`hashes_of` makes them.
        lengths: How many words the hidden names have.
        sequences: Hashes of the actions of each hidden sequence, in order.
    """

    hashed: Callable[[str], str]
    names: frozenset[str] = frozenset()
    lengths: frozenset[int] = frozenset()
    sequences: tuple[tuple[str, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.sequences)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where hidden names stand, whatever their case, accents, spaces and punctuation."""
        if not self.names:
            return
        found = fold(text)
        ends = [place for place, gap in enumerate(found.gaps) if gap != JOINED]
        words = [
            (found.letters[start:end], found.starts[start], found.ends[end - 1])
            for start, end in pairwise(ends)
        ]
        for count in sorted(self.lengths, reverse=True):
            for place in range(len(words) - count + 1):
                run = words[place : place + count]
                if self.hashed(" ".join(word for word, _, _ in run)) in self.names:
                    yield run[0][1], run[-1][2]

    def names_any(self, text: str) -> bool:
        """Whether a hidden name stands in a text."""
        return next(self.spans(text), None) is not None

    def without(self, text: str) -> str:
        """The text without sentences in which a hidden name stands."""
        spans = list(self.spans(text))
        if not spans:
            return text
        left, start = list[str](), 0
        for gap in (*SENTENCE.finditer(text), None):
            end, after = gap.span() if gap else (len(text), len(text))
            if not any(first < end and start < last for first, last in spans):
                left.append(text[start:end])
            start = after
        return " ".join(left)

    def wrapped(self, tools: Sequence[Tool]) -> list[Tool]:
        """The same tools for one episode; what was done in it is remembered."""
        done: list[str] = []
        return [self._wrapped(one, done) for one in tools] if self else list(tools)

    def _wrapped(self, tool: Tool, done: list[str]) -> Tool:
        def use(asked: BaseModel) -> str:
            given = asked.model_dump(mode="json")
            action = self.hashed(canonical(Action(tool=tool.name, arguments=given)))
            if any(self._completes([*done, action], one) for one in self.sequences):
                return NOT_NOW
            done.append(action)
            changed, swapped = self._disguised(given)
            if not swapped:
                return self.without(tool.use(asked))
            result = self.without(tool.use(tool.arguments.model_validate(changed)))
            for place, name in reversed(list(enumerate(swapped))):
                result = result.replace(f"{NOBODY}{place}", name)
            return result

        return Tool(tool.name, tool.about, tool.arguments, use)

    @staticmethod
    def _completes(done: Sequence[str], sequence: tuple[str, ...]) -> bool:
        return tuple(done[-len(sequence) :]) == sequence

    def _disguised(self, value: Any, names: list[str] | None = None) -> tuple[Any, list[str]]:
        """A value with a name that nobody has for each hidden one, and those in order."""
        names = [] if names is None else names
        if isinstance(value, dict):
            return {key: self._disguised(one, names)[0] for key, one in value.items()}, names
        if isinstance(value, list):
            return [self._disguised(one, names)[0] for one in value], names
        if not isinstance(value, str):
            return value, names
        end, text = 0, ""
        for start, stop in sorted(self.spans(value)):
            if start >= end:
                text += f"{value[end:start]}{NOBODY}{len(names)}"
                names.append(value[start:stop])
                end = stop
        return text + value[end:], names


def folded(text: str) -> str:
    """Words as they are compared."""
    return " ".join(fold(text).words())


def of_names(hashed: Callable[[str], str], names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Hashes of names, and how many words each has; one of several words may be written as one."""
    words = [fold(one).words() for one in names]
    words += [["".join(one)] for one in words if len(one) > 1]
    return [hashed(" ".join(one)) for one in words], [len(one) for one in words]


def of_actions(hashed: Callable[[str], str], actions: Sequence[Action]) -> list[str]:
    """Hashes of actions, in order."""
    return [hashed(canonical(one)) for one in actions]


def holds(done: Sequence[Action], sequence: Sequence[Action]) -> bool:
    """Whether some actions stand one right after the other in what was done."""
    all_, part = [canonical(one) for one in done], [canonical(one) for one in sequence]
    return bool(part) and any(
        all_[place : place + len(part)] == part for place in range(len(all_) - len(part) + 1)
    )


__all__ = [
    "NOBODY", "NOT_NOW", "WORD", "Mask", "folded", "holds", "of_actions", "of_names",
]  # fmt: skip
