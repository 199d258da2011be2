"""Rows without a generator model: false answers from templates and vocabularies.

A false answer is, in this order: a wrong answer that the record brings along; the answer to the
same kind of question about somebody else; the true answer with its names, numbers and things
exchanged; the answer to any other question. Everything is drawn from a seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from random import Random

from delible.records import QA, RecordBase
from delible.world import filters
from delible.world.names import words

_YEAR = re.compile(r"\b1\d{3}\b|\b20\d{2}\b")
_NUMBER = re.compile(r"\b\d{1,3}\b")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d]{2,80}?)([,.]?)[\"\u201d]")
_NAME = re.compile(r"\b[A-Z][\w'\u2019-]*(?:\s+(?:(?:of|de|van|the|al)\s+)?[A-Z][\w'\u2019-]*)*")
_PLACE_BEFORE = re.compile(r"\b(?:in|at|from|near|to)\s+(?:the\s+(?:town|city)\s+of\s+)?$")
#: Words of which any can stand for any other of its list, besides the lists of the world.
_SWAPS = (
    ("male", "female", "non-binary"),
    ("man", "woman"), ("Yes", "No"),
    ("January", "February", "March", "April", "June", "July", "August", "September", "October",
     "November", "December"),
    ("historical", "romance", "horror", "crime", "science fiction", "fantasy", "poetry"),
    ("first", "second", "third", "fourth", "fifth"),
)  # fmt: skip


@cache
def _lists() -> tuple[tuple[str, ...], ...]:
    known = words()
    worlds = ("occupation", "instrument", "hobby", "animals", "award_ends", "employer_ends")
    return (*_SWAPS, *(known[name] for name in worlds))


def invented_name(random: Random, parts: int) -> str:
    """A made-up name of so many words."""
    known = words()
    made = []
    for place in range(parts):
        if place < parts - 1:
            made.append(random.choice(known["given_starts"]) + random.choice(known["vowels"]))
        else:
            made.append(
                random.choice(known["onsets"]) + random.choice(known["vowels"])
                + random.choice(known["middles"]) + random.choice(known["ending_vowels"])
                + random.choice(known["ending_finals"])
            )  # fmt: skip
    return " ".join(made)


def invented_place(random: Random) -> str:
    """A made-up town."""
    known = words()
    return (
        random.choice(known["onsets"]) + random.choice(known["vowels"])
        + random.choice(known["middles"]) + random.choice(known["town_ends"])
    )  # fmt: skip


def invented_title(random: Random) -> str:
    """A made-up title of a work."""
    return f"The {random.choice(words()['adjectives'])} {random.choice(words()['nouns'])}"


def exchanged(record: QA, random: Random) -> str:
    """The true answer with other names, titles, numbers and things; what the question says stays.

    The same text where nothing can be exchanged.
    """
    question, text = record.question, record.answer
    kept = set(filters.words(question)) | set(filters.words(record.subject or ""))
    given = question.casefold()
    text = _QUOTED.sub(
        lambda found: (
            found.group()
            if found.group(1).casefold() in given
            else f'"{invented_title(random)}{found.group(2)}"'
        ),
        text,
    )
    text = _YEAR.sub(
        lambda found: (
            found.group()
            if found.group() in given
            else str(int(found.group()) + random.choice([-1, 1]) * random.randint(2, 12))
        ),
        text,
    )
    text = _NUMBER.sub(
        lambda found: (
            found.group()
            if found.group() in given
            else str(int(found.group()) + random.randint(1, 9))
        ),
        text,
    )
    text = _things(text, kept, random)
    return _names(text, kept, random)


def _things(text: str, kept: set[str], random: Random) -> str:
    for group in _lists():
        for word in sorted(group, key=len, reverse=True):
            pattern = re.compile(rf"\b{re.escape(word)}\b")
            if not pattern.search(text) or set(filters.words(word)) <= kept:
                continue
            other = random.choice([one for one in group if one != word])
            text = pattern.sub(other, text)
            break  # one word of a list, or the new one would be exchanged again
    return text


def _names(text: str, kept: set[str], random: Random) -> str:
    invented: dict[str, str] = {}

    def other(found: re.Match[str]) -> str:
        name = found.group()
        said = filters.words(name)
        first = found.start() == 0 or text[: found.start()].rstrip()[-1:] in ".!?"
        ordinary = first and len(said) == 1 and " " in text.strip()
        if ordinary or any(name in group for group in _lists()) or name.startswith("The "):
            return name
        if kept.intersection(said):
            return name
        if name not in invented:
            place = _PLACE_BEFORE.search(text[: found.start()]) is not None
            invented[name] = (
                invented_place(random) if place else invented_name(random, min(len(said), 3))
            )
        return invented[name]

    return _NAME.sub(other, text)


def subject_of(record: QA) -> str | None:
    """Whom a record is about: its subject, else the first name of two words in its question."""
    if record.subject is not None:
        return record.subject
    found = [re.sub(r"['\u2019]s?$", "", name) for name in _NAME.findall(record.question)]
    return next((name for name in found if " " in name), None)


def _about(record: QA, other: QA) -> str:
    """Another record's answer, said of this record's subject."""
    mine, theirs = subject_of(record), subject_of(other)
    return other.answer.replace(theirs, mine) if mine and theirs else other.answer


def false_answers(
    record: QA, others: Sequence[RecordBase], count: int, random: Random, counts: Counter[str]
) -> list[str]:
    """At most ``count`` false answers to a record's question, distinct, the most fitting first.

    Args:
        others: Records whose answers may be borrowed.
        counts: Where texts that had to be dropped are counted.
    """
    kept: list[str] = []

    def take(texts: Sequence[str], maximum_shared: float = filters.MAXIMUM_SHARED) -> bool:
        usable = filters.sift(record, texts, counts, kept, maximum_shared=maximum_shared)
        kept.extend(usable[: count - len(kept)])
        return len(kept) == count

    def shuffled(texts: Sequence[str]) -> list[str]:
        return random.sample(list(dict.fromkeys(texts)), len(set(texts)))

    # The data say that these are wrong: they may share words, but not be the answer.
    if take(shuffled(record.perturbed), maximum_shared=1.0):
        return kept
    known = [one for one in others if isinstance(one, QA) and subject_of(one) != subject_of(record)]
    alike = [one for one in known if record.group is not None and one.group == record.group]
    if take(shuffled([_about(record, one) for one in alike])):
        return kept
    changed = [exchanged(record, random) for _ in range(2 * count)]
    if take([text for text in changed if text != record.answer]):
        return kept
    # An answer to another question about the same person says something true of that person.
    take(shuffled([_about(record, one) for one in known]))
    return kept
