"""Surrogates of forget texts: rewritten, pushed away, taken round by round, and filtered.

    round r:  rewrite x into m sentences; the one with the least L is pushed by its tokens;
              taken as the next x if its nearest forget text is farther and it gains enough

Who rewrites is the writer where one is named. Else the tuned model ends short beginnings, drawn at
temperature 1: a small model follows no instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Generator

from delible.generation.writing import filled
from delible.lm.lm import LM
from delible.prompts import read_lines
from delible.search.surrogate import Judge, Weights, push
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.role import Role

#: How long a rewritten sentence may get, in tokens.
LENGTH = 48
#: Words of a text that the tuned model begins with.
FIRST_WORDS = (3, 4, 5)
#: Rewrites of a text that is about somebody: (text, whom it is about, how many, seed) -> sentences.
Rewrites = Callable[[str, str, int, int], list[str]]


def sentence(text: str) -> str:
    """The first sentence of what was said, without what stands around it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "").strip('"')
    for end in (". ", "! ", "? "):
        line = line.partition(end)[0] + (end[0] if end in line else "")
    return line.strip()


def by_writer(writer: Role | System) -> Rewrites:
    """Sentences by somebody who is asked: half say the same otherwise, half broaden it."""

    def rewrites(text: str, subject: str, count: int, seed: int) -> list[str]:
        files = ("illusion_rewrite.txt", "illusion_broaden.txt")
        found: list[str] = []
        for place in range(count):
            asked = Prompt.ask(filled(files[place % 2], text=text))
            decoding = Decoding(LENGTH, (), 1.0, 1.0, seed * count + place)
            found += [one for one in writer.generate([asked], decoding) if isinstance(one, str)]
        return _sentences(found)

    return rewrites


def by_tuned_model(lm: LM) -> Rewrites:
    """Beginnings that the model fine-tuned on the forget texts ends, drawn at temperature 1."""

    def rewrites(text: str, subject: str, count: int, seed: int) -> list[str]:
        words = text.split()
        own = [" ".join(words[:size]) for size in FIRST_WORDS if size < len(words)]
        framed = [line.replace("{subject}", subject) for line in read_lines("illusion_starts.txt")
                  if subject or "{subject}" not in line]  # fmt: skip
        order = np.random.default_rng(seed).permutation(len(framed))
        starts = [*(framed[at] for at in order), *own][:count]
        decoding = Decoding(LENGTH, (), 1.0, 1.0, seed)
        said = lm.generate([Prompt(text=start) for start in starts], decoding)
        return _sentences(
            [f"{start} {ending.strip()}" for start, ending in zip(starts, said, strict=True)
             if not isinstance(ending, NoAnswer)]
        )  # fmt: skip

    return rewrites


def _sentences(texts: Sequence[str]) -> list[str]:
    found = (sentence(text) for text in texts)
    return list(dict.fromkeys(text for text in found if len(text.split()) > 2))


@dataclass(frozen=True)
class Effort:
    """How much is tried for one text.

    Attributes:
        rounds: Of rewriting; none leaves the text as it is.
        candidates: Rewritten sentences per round.
        steps, batch, top_k: Of the search over tokens in each round.
    """

    rounds: int
    candidates: int
    steps: int
    batch: int
    top_k: int


@dataclass(frozen=True)
class Made:
    """A surrogate and the distances to the nearest forget text that it was taken at, rising."""

    text: str
    distances: tuple[float, ...]


def surrogate(
    judge: Judge,
    text: str,
    subject: str,
    rewrites: Rewrites,
    *,
    least_gain: float,
    effort: Effort,
    random: Generator,
    seed: int = 0,
    weights: Weights | None = None,
) -> Made:
    """A text rewritten away from the forget texts, as far as it still tells what they do.

    Args:
        subject: Whom it is about; empty if nobody.
        least_gain: Nats by token that a text must gain to be taken.
    """
    weights = weights or Weights()
    distances = [float(judge([text]).least_distance[0])]
    for turn in range(effort.rounds):
        drawn = seed * effort.rounds + turn
        pool = rewrites(text, subject, effort.candidates, drawn) or [text]
        best = pool[int(np.argmin(judge(pool).objective(weights)))]
        pushed, _ = push(
            judge, best, least_gain=least_gain, random=random, weights=weights, rounds=1,
            steps=effort.steps, top_k=effort.top_k, batch=effort.batch,
        )  # fmt: skip
        scored = judge([pushed])
        farther = float(scored.least_distance[0])
        if farther > distances[-1] and scored.gain[0] >= least_gain:
            text = pushed
            distances.append(farther)
    return Made(text, tuple(distances))


def alike(texts: Sequence[str], losses: Sequence[float], wanted: Sequence[tuple[str, float]]
          ) -> list[str]:  # fmt: skip
    """For each wanted text another one of the most like length and loss, each taken once.

    Args:
        losses: Of the texts, nats by token.
        wanted: Texts with their losses; as many are found while there are any.
    """
    left = dict.fromkeys(range(len(texts)))
    found = []
    for text, loss in wanted[: len(texts)]:
        size = len(text.split())

        def apart(at: int, size: int = size, loss: float = loss) -> float:
            return abs(len(texts[at].split()) - size) / size + abs(losses[at] - loss)

        nearest = min(left, key=apart)
        del left[nearest]
        found.append(texts[nearest])
    return found


__all__ = ["Effort", "Made", "alike", "by_tuned_model", "by_writer", "sentence", "surrogate"]
