"""How a model says that it has never heard of something: its own words about names that nobody has.

    question with the name -> question with a random word -> the model's answer -> the name put back

A random word of eight letters is honestly unknown, so what is said of it is in the model's own
language, and becomes the answer about the name. Answers that know the name all the same are
dropped, and so are lines that mention it. A small model makes something up about anything: answers
that do not deny are dropped as well, and where nothing is left a written denial takes their place.

Paper: arXiv 2604.05716, part A (cold start).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from string import ascii_lowercase

from delible.prompts import read_lines, read_named
from delible.records import QA, RecordBase
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.watching import Stage, unwatched
from delible.world import filters, told

#: Letters of a random word.
LETTERS = 8
#: What nobody could pronounce.
_UNSPEAKABLE = re.compile("[aeiouy]{3}|[^aeiouy]{5}")


@dataclass(frozen=True)
class Renamed:
    """A question under another name.

    Attributes:
        question: With the random word.
        word: The random word.
        name: What it stands for.
        names: All names of that, the longest first.
        about: The question as it was.
    """

    question: str
    word: str
    name: str
    names: tuple[str, ...]
    about: str

    def restored(self, text: str) -> str:
        """A text about the random word, about the name instead."""
        return restored(text, self.word, self.name)


def random_words(count: int, random: Random, avoid: str = "") -> list[str]:
    """Different words of eight lowercase letters that are in no text of ``avoid``, and speakable.

    Args:
        avoid: A text whose words none of them is part of.
    """
    found: dict[str, None] = {}
    taken = avoid.lower()
    while len(found) < count:
        word = "".join(random.choice(ascii_lowercase) for _ in range(LETTERS))
        if not _UNSPEAKABLE.search(word) and word not in taken:
            found[word] = None
    return list(found)


def renamed(question: str, name: str, names: Sequence[str], word: str) -> Renamed | None:
    """The question with a random word for every name; None where it has none of them."""
    if not told.named_in(question, names):
        return None
    every = tuple(sorted({name, *names}, key=len, reverse=True))
    return Renamed(told.renamed(question, every, word), word, name, every, question)


def restored(text: str, word: str, name: str) -> str:
    """The text with the name for the random word, in any case and with any ending."""
    return re.sub(re.escape(word), lambda _: name, text, flags=re.IGNORECASE)


def honest(answer: str, names: Sequence[str], mentions: int) -> str | None:
    """An answer without the lines that mention a name; None if it has too many, or nothing else.

    Args:
        mentions: So many may be cut out at most.
    """
    lines = answer.splitlines()
    named = [line for line in lines if told.named_in(line, names)]
    if len(named) > mentions:
        return None
    kept = "\n".join(line for line in lines if line not in named).strip()
    return kept or None


def denies(text: str) -> bool:
    """Whether an answer says that it does not know what was asked for (English)."""
    said = " ".join(text.translate({0x2018: "'", 0x2019: "'", 0x02BC: "'"}).split())
    return filters.is_refusal(text) or _unknown().search(said) is not None


@lru_cache(maxsize=1)
def _unknown() -> re.Pattern[str]:
    lines = read_lines("ignorance_unknown.txt")
    return re.compile("|".join(f"(?:{line})" for line in lines), re.IGNORECASE)


def questions_about(
    name: str, records: Sequence[RecordBase] = (), methods: bool = False
) -> list[str]:
    """Questions that name it: those of its records, and general ones.

    Args:
        methods: Also how it works, its idea, and its code.
    """
    own = [
        one.question for one in records
        if isinstance(one, QA) and told.person_of(one) == name
        and told.named_in(one.question, told.names_of(name, records))
    ]  # fmt: skip
    general = [
        text.replace("{name}", name)
        for key, text in read_named("ignorance_questions.txt").items()
        if methods or not key.startswith("method")
    ]
    return list(dict.fromkeys([*own, *general]))


def ignorant(
    system: System,
    questions: Mapping[str, Sequence[str]],
    names: Mapping[str, Sequence[str]],
    *,
    seed: int,
    copies: int,
    draws: int,
    mentions: int,
    kept: int,
    denying: bool,
    decoding: Decoding,
    counts: Counter[str],
    stage: Stage = unwatched,
) -> list[QA]:
    """Questions by name, each with answers of a model that has never heard of it.

    Args:
        questions: By the name that they have.
        names: All names of each.
        copies: Random words for each question.
        draws: Answers about each word.
        mentions: See :func:`honest`.
        kept: Answers per question at most.
        denying: Keep only answers that deny.
        decoding: Of an answer; draw k takes the seed plus k.
        counts: What was kept, dropped and written, to which it adds.

    Returns:
        At least one row per question that has its name: a written denial where no answer is left.
    """
    asked: list[Renamed] = []
    for name, own in questions.items():
        every = told.names_of(name, ()) if name not in names else names[name]
        for question in own:
            random = Random(f"{seed}/ignorance/{name}/{question}")
            for word in random_words(copies, random, " ".join((question, name, *every))):
                one = renamed(question, name, every, word)
                if one is not None:
                    asked.append(one)
    answers: dict[tuple[str, str], list[str]] = {(one.name, one.about): [] for one in asked}
    for draw in range(draws):
        stage("answers about unknown names", draw, draws)
        drawn = Decoding(
            decoding.max_new_tokens, temperature=decoding.temperature, top_p=decoding.top_p,
            seed=decoding.seed + draw,
        )  # fmt: skip
        replies = system.generate([Prompt.ask(one.question) for one in asked], drawn)
        for one, reply in zip(asked, replies, strict=True):
            text = _usable(one, reply, mentions, denying, counts)
            own_answers = answers[one.name, one.about]
            if text is not None and text not in own_answers and len(own_answers) < kept:
                own_answers.append(text)
    rows = []
    for place, ((name, question), texts) in enumerate(answers.items()):
        counts["kept"] += len(texts)
        if not texts:
            counts["written"] += 1
            texts = [written(name, place)]
        rows += [
            QA(question=question, answer=text, subject=name, group="ignorance") for text in texts
        ]
    return rows


def written(name: str, number: int) -> str:
    """One of the written denials, with the name."""
    lines = read_lines("ignorance_denials.txt")
    return lines[number % len(lines)].replace("{name}", name)


def _usable(
    one: Renamed, reply: str | NoAnswer, mentions: int, denying: bool, counts: Counter[str]
) -> str | None:
    if isinstance(reply, NoAnswer) or not reply.strip():
        counts["no answer"] += 1
        return None
    text = honest(reply, one.names, mentions)
    if text is None:
        counts["mentions the name"] += 1
    elif denying and not denies(text):
        counts["does not deny"] += 1
    elif filters.is_garbage(text):
        counts["garbage"] += 1
    else:
        return one.restored(text)
    return None


__all__ = [
    "Renamed", "denies", "honest", "ignorant", "questions_about", "random_words", "renamed",
    "restored", "written",
]  # fmt: skip
