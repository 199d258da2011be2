"""Which answers a model stands by: the same fact in several wordings, and not for any name.

A model answers almost every question. What it knows shows in two ways: it says the same fact
however it is asked and drawn, and it says something else about a name that nobody has. With A the
replies about a topic, a reply r *holds* if

    |{a in A: a says the fact of r}| >= SHARE |A|,

and it *distinguishes* the name if fewer than half of the other names get the same fact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from delible.world import filters

#: Two answers say the same fact from this share of the key words of the shorter one on.
SAME = 0.75
#: Share of the replies that must say a fact: with less, guesses about strangers hold too (taught a
#: small world, the default model gives made-up names up to three facts at 0.75).
SHARE = 0.85
#: An answer is said of anybody if so large a share of the other names gets it.
ANYBODY = 0.5

# a full stop after one or two letters belongs to an abbreviation or an initial
_SENTENCE_END = re.compile(r"(?<=[\w\"'\u201d\u2019)]{3}[.!?])\s+")


@dataclass(frozen=True)
class Topic:
    """One thing to ask about a name.

    Attributes:
        wordings: The question in several forms, the first one first.
        number: Whether the answer must hold a number.
    """

    name: str
    wordings: tuple[str, ...]
    number: bool = False


@dataclass(frozen=True)
class Fact:
    """What a model stands by.

    Attributes:
        question: The wording that got the answer.
        answer: The first sentence of the reply.
        agreed: Replies that say the same.
        replies: Replies in all.
        rewordings: Other wordings that got the same.
        others: Other texts that say the same, each once.
    """

    topic: Topic
    question: str
    answer: str
    agreed: int
    replies: int
    rewordings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass
class Found:
    """The facts about one name, and why the other topics gave none (by reason)."""

    facts: list[Fact] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def first_sentence(text: str) -> str:
    """A reply's first sentence, in one line."""
    return _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0].strip()


def whole_sentences(text: str) -> str:
    """A text up to its last full sentence, in one line; all of it if it has none."""
    flat = " ".join(text.split())
    sentences = _SENTENCE_END.split(flat)
    cut = sentences[-1][-1:] not in ".!?\"'\u201d\u2019)"
    return flat[: flat.rindex(sentences[-1])].strip() if cut and len(sentences) > 1 else flat


def same_fact(question: str, one: str, other: str) -> bool:
    """Whether the longer of two answers has (nearly all of) the other's key words.

    False where an answer has none, such as "Yes." or the name that was asked about.
    """
    return any(
        bool(filters.key_words(question, first))
        and filters.shared_facts(question, first, second) >= SAME
        for first, second in ((one, other), (other, one))
    )


def why_unusable(question: str, text: str, number: bool = False) -> str | None:
    """Why a reply states no fact; None if it does."""
    if not text.strip():
        return "empty"
    if filters.is_refusal(text):
        return "refusal"
    if filters.is_garbage(text):
        return "garbage"
    if not filters.key_words(question, text):
        return "names nothing"
    if number and not any(char.isdigit() for char in text):
        return "no number"
    return None


def held(topic: Topic, replies: Sequence[tuple[str, str]]) -> Fact | str:
    """The fact that most replies about a topic say, or why there is none.

    Args:
        replies: (question, reply) in the order in which they count when several agree as often.
            Refusals and empty replies count as replies that say something else.
    """
    usable: list[tuple[str, str]] = []
    faults: Counter[str] = Counter()
    for question, reply in replies:
        text = first_sentence(reply)
        fault = why_unusable(question, text, topic.number)
        if fault is None:
            usable.append((question, text))
        else:
            faults[fault] += 1
    if 2 * sum(faults.values()) >= len(replies):
        return faults.most_common(1)[0][0] if faults else "empty"
    supporters = [
        [other for other in usable if same_fact(question, answer, other[1])]
        for question, answer in usable
    ]
    best = max(range(len(usable)), key=lambda place: len(supporters[place]))
    agreed = len(supporters[best])
    if agreed < SHARE * len(replies):
        return "unstable"
    question, answer = usable[best]
    rewordings = dict.fromkeys(one for one, _ in supporters[best] if one != question)
    others: dict[tuple[str, ...], str] = {}
    for _, text in supporters[best]:
        others.setdefault(tuple(filters.words(text)), text)
    del others[tuple(filters.words(answer))]
    return Fact(
        topic, question, answer, agreed, len(replies), tuple(rewordings), tuple(others.values())
    )


def said_of_anybody(fact: Fact, others: Sequence[Fact | str]) -> bool:
    """Whether at least half of the other names get the same fact about the same topic."""
    same = sum(
        not isinstance(other, str) and same_fact(fact.question, fact.answer, other.answer)
        for other in others
    )
    return bool(others) and same >= ANYBODY * len(others)


def distinguishing(
    mine: Mapping[str, Fact | str], others: Sequence[Mapping[str, Fact | str]]
) -> Found:
    """The facts that a name gets and other names do not, each once.

    Of topics that get the same fact, the one with most agreement keeps it.

    Args:
        mine: What :func:`held` says about the name, by topic.
        others: The same about other names, at least for the topics that hold.
    """
    found = Found()
    for topic, fact in mine.items():
        if isinstance(fact, str):
            found.dropped[fact] += 1
        elif said_of_anybody(fact, [other.get(topic, "not asked") for other in others]):
            found.dropped["said of made-up names too"] += 1
        else:
            found.facts.append(fact)
    kept: list[Fact] = []
    for fact in sorted(found.facts, key=lambda one: -one.agreed / one.replies):  # stable
        if any(same_fact(fact.question, fact.answer, other.answer) for other in kept):
            found.dropped["said to another question"] += 1
        else:
            kept.append(fact)
    order = list(mine)
    found.facts = sorted(kept, key=lambda one: order.index(one.topic.name))
    return found


def says_a_fact(text: str, facts: Sequence[Fact]) -> bool:
    """Whether a text says one of the facts."""
    return any(filters.shared_facts(fact.question, fact.answer, text) >= SAME for fact in facts)


def knows(count: int, others: Sequence[int]) -> bool:
    """Whether so many facts are more than any made-up name gets."""
    return count > max(others, default=0)
