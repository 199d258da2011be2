"""How much a student knows: measured from its own scores, or from the letters that it answers.

    share(o) = exp(s_o) / sum of exp(s_o'),    s_o = mean log p(tokens of o | lesson, question)

A fact is known where the right option has the largest share, and firmly where that is half or
more; firmly wrong is a misconception. The question is asked without its options, so no letter and
no order can matter. A system without scores is shown the options in several orders and answers
with a letter; the shares are then those of its answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from delible.measure.scoring.choices import rotated
from delible.measure.scoring.text import chosen_option
from delible.messages import Message
from delible.records import Choice
from delible.system.asks import Decoding, Prompt, Score, TokenScores
from delible.system.base import System
from delible.system.questions import ask
from delible.teaching.items import Item

#: What a student is about one fact, or about a topic.
State = Literal["unknown", "misconception", "partial", "correct"]
STATES: tuple[State, ...] = ("unknown", "misconception", "partial", "correct")
#: A share from which an answer is firm.
FIRM = 0.5
#: Shares that differ by no more are the same: a draw is no knowledge.
SAME = 1e-9
#: A topic is known where so many of its facts are.
KNOWN = 0.8
#: A recovery needs at least this much room between the novice and the original.
ROOM = 0.02
#: A student that names an option less often than this has lost its way, and is no novice.
VALID = 0.98


@dataclass(frozen=True)
class Answered:
    """One fact, as the student answers it now.

    Attributes:
        shares: Of the options, the right one first; they sum to 1, or are all 0: no option was
            named.
        right: Share of the orders in which the right option is named; by scores 1 or 0, or its
            part of a draw.
        valid: Share of the answers that name an option.
    """

    item: Item
    shares: tuple[float, ...]
    right: float
    valid: float = 1.0

    @property
    def state(self) -> State:
        """Unknown where no option is firm and the right one is not ahead."""
        if not any(self.shares):
            return "unknown"
        others = max(self.shares[1:], default=0.0)
        firm = max(self.shares) >= FIRM
        if abs(self.shares[0] - others) <= SAME:
            return "unknown"
        if self.shares[0] > others:
            return "correct" if firm else "partial"
        return "misconception" if firm else "unknown"


@dataclass(frozen=True)
class Level:
    """What a student knows now.

    Attributes:
        answers: One per item.
        by: "scores" or "answers".
    """

    answers: tuple[Answered, ...]
    by: Literal["scores", "answers"]

    @property
    def accuracy(self) -> float:
        """Share of items answered right, in [0, 1]; chance is one option's part."""
        return _mean([one.right for one in self.answers])

    @property
    def key_share(self) -> float:
        """Mean share of the right option, in [0, 1]."""
        return _mean([one.shares[0] for one in self.answers])

    @property
    def valid(self) -> float:
        """Share of the answers that named an option, in [0, 1]; below :data:`VALID`: no novice."""
        return _mean([one.valid for one in self.answers])

    def of(self, topic: str) -> Level:
        """The level in one topic."""
        return Level(tuple(one for one in self.answers if one.item.topic == topic), self.by)

    @property
    def state(self) -> State:
        """Of all items together: what most of them are."""
        states = [one.state for one in self.answers]
        count = {state: states.count(state) / max(1, len(states)) for state in STATES}
        if count["correct"] + count["partial"] >= KNOWN and count["correct"] >= FIRM:
            return "correct"
        if count["misconception"] > FIRM:
            return "misconception"
        return "partial" if count["correct"] + count["partial"] > 0 else "unknown"

    def states(self) -> Mapping[str, State]:
        """By topic."""
        topics = dict.fromkeys(one.item.topic for one in self.answers)
        return {topic: self.of(topic).state for topic in topics}


def read_level(
    system: System, items: Sequence[Item], heard: Sequence[Message], *, orders: int = 4
) -> Level:
    """The level of a student after a conversation; the conversation stays as it is.

    Args:
        heard: The persona, and what was said.
        orders: In which a system without scores is shown the options.
    """
    if "score" in system.capabilities:
        found = _by_scores(system, items, heard)
        return Level(tuple(found), "scores")
    return Level(tuple(_by_answers(system, items, heard, orders)), "answers")


def _by_scores(system: System, items: Sequence[Item], heard: Sequence[Message]) -> list[Answered]:
    asked = [
        Score(Prompt((*heard, Message(role="user", content=item.choice.question))), option)
        for item in items for option in item.choice.options
    ]  # fmt: skip
    scores = iter(system.score(asked))
    found = []
    for item in items:
        means = []
        for _ in item.choice.options:
            one = next(scores)
            fine = isinstance(one, TokenScores) and one.logprobs.size > 0
            means.append(float(one.logprobs.mean()) if fine else math.nan)  # type: ignore[union-attr]
        shares = shares_of(means)
        best = [place for place, one in enumerate(shares) if one >= max(shares) - SAME]
        right = float(any(shares)) * (0 in best) / len(best)
        found.append(Answered(item, shares, right, float(any(shares))))
    return found


def shares_of(means: Sequence[float]) -> tuple[float, ...]:
    """Softmax of mean log-probabilities; all 0 where one is missing (no number) or all are -inf."""
    top = max(means)
    if any(map(math.isnan, means)) or not math.isfinite(top):
        return (0.0,) * len(means)
    parts = [math.exp(one - top) for one in means]
    return tuple(one / sum(parts) for one in parts)


def _by_answers(
    system: System, items: Sequence[Item], heard: Sequence[Message], orders: int
) -> list[Answered]:
    asked: list[tuple[int, Prompt, Choice, int]] = []
    for place, item in enumerate(items):
        plain = ask(item.choice)
        assert plain is not None
        for steps in range(min(orders, len(item.choice.options))):
            turned = rotated(item.choice, plain, steps)
            assert turned is not None
            prompt = Prompt((*heard, *turned[0].messages))
            options = item.choice.options
            shown = item.choice.model_copy(
                update={"options": options[steps:] + options[:steps], "correct": turned[1]}
            )
            asked.append((place, prompt, shown, steps))
    replies = system.generate([one[1] for one in asked], Decoding(8))
    counts = [[0] * len(item.choice.options) for item in items]
    tried = [0] * len(items)
    for (place, _, shown, steps), reply in zip(asked, replies, strict=True):
        named = chosen_option(reply, shown) if isinstance(reply, str) else None
        tried[place] += 1
        if named is not None:
            counts[place][(named + steps) % len(shown.options)] += 1
    found = []
    for item, count, total in zip(items, counts, tried, strict=True):
        valid = sum(count)
        shares = tuple(one / valid if valid else 0.0 for one in count)
        found.append(Answered(item, shares, count[0] / total, valid / total))
    return found


def recovery(original: float | None, before: float | None, after: float | None) -> float | None:
    """(after - before) / (original - before): 1 = as before unlearning, 0 = nothing came back.

    Negative when the lesson made it worse. None where a value is missing, or where the student
    lacks nothing that a lesson could bring back.
    """
    if original is None or before is None or after is None or abs(original - before) < ROOM:
        return None
    return (after - before) / (original - before)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


__all__ = ["STATES", "Answered", "Level", "State", "read_level", "recovery", "shares_of"]
