"""Names of fictional people, places, works and employers, put together from invented syllables.

Surnames end in as many different ways as the syllables allow: the first hundred differ in their
last two letters, so that an editor that keys on the last token of a subject can tell people
apart. No surname begins with another, so that a search for one name never hits inside another.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from random import Random
from typing import Literal

Gender = Literal["woman", "man"]


@cache
def words() -> dict[str, tuple[str, ...]]:
    """Syllables and words by list name (data file)."""
    table = tomllib.loads(files(__package__).joinpath("words.toml").read_text("utf-8"))
    lists = table.pop("words")
    return {
        **{name: tuple(text.split()) for name, text in table.items()},
        **{
            name: tuple(" ".join(w.split()) for w in text.split(","))
            for name, text in lists.items()
        },
    }


class Namer:
    """Draws names that it has not given before.

    Args:
        seed: Seed of the world; each kind of name has a stream of its own.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams: dict[str, Random] = {}
        self._taken: set[str] = set()
        self._surnames: set[str] = set()
        self._surname_beginnings: set[str] = set()
        self._surname_count = 0
        self._words = words()
        self._endings = _spread(
            [v + f for v in self._words["ending_vowels"] for f in self._words["ending_finals"]],
            self._stream("endings"),
        )

    def _stream(self, purpose: str) -> Random:
        if purpose not in self._streams:
            self._streams[purpose] = Random(f"{self._seed}/names/{purpose}")
        return self._streams[purpose]

    def take(self, name: str) -> bool:
        """Whether ``name`` was still free; it is taken afterwards."""
        key = name.casefold()
        if key in self._taken:
            return False
        self._taken.add(key)
        return True

    def surname(self) -> str:
        """A surname that nobody has, which neither begins another one nor begins with one."""
        stream = self._stream("surname")
        ending = self._endings[self._surname_count % len(self._endings)]
        self._surname_count += 1
        stem = ""
        for attempt in range(10_000):
            # After many collisions the syllables are used up: one more makes room again.
            extra = (
                stream.choice(self._words["vowels"]) + stream.choice(self._words["middles"])
                if attempt > 50
                else ""
            )
            stem = (
                stream.choice(self._words["onsets"])
                + stream.choice(self._words["vowels"])
                + stream.choice(self._words["middles"])
            )
            surname = stem + extra + ending
            beginnings = {surname[:length] for length in range(3, len(surname) + 1)}
            if surname in self._surname_beginnings or beginnings & self._surnames:
                continue
            if self.take(surname):
                self._surnames.add(surname)
                self._surname_beginnings |= beginnings
                return surname
        raise RuntimeError("The syllables for surnames are used up.")

    def given(self, gender: Gender, family: set[str]) -> str:
        """A given name that no member of the family has, nor ends with, nor is the end of."""
        stream = self._stream("given")
        while True:
            given = stream.choice(self._words["given_starts"]) + stream.choice(
                self._words[f"given_ends_{gender}"]
            )
            key = given.casefold()
            if not any(key.endswith(other) or other.endswith(key) for other in family):
                family.add(key)
                return given

    def aliases(self, given: str, surname: str, gender: Gender) -> tuple[str, ...]:
        """One or two aliases: initial and surname, and a nickname or a pen name."""
        stream = self._stream("aliases")
        aliases: list[str] = []
        if self.take(initials := f"{given[0]}. {surname}"):
            aliases.append(initials)
        style = stream.choice(("none", "nickname", "pen name"))
        start = next(
            s for s in sorted(self._words["given_starts"], key=len)[::-1] if given.startswith(s)
        )
        nickname = f"{start}{stream.choice(self._words['nickname_ends'])} {surname}"
        if style == "nickname" and self.take(nickname):
            aliases.append(nickname)
        if style == "pen name" or not aliases:
            pen_name = f"{self.given(gender, set())} {self.surname()}"
            self.take(pen_name)
            aliases.append(pen_name)
        return tuple(aliases)

    def _stem(self, purpose: str) -> str:
        stream = self._stream(purpose)
        while True:
            stem = (
                stream.choice(self._words["onsets"])
                + stream.choice(self._words["vowels"])
                + stream.choice(self._words["middles"])
            )
            stem += stream.choice("aeiou") + stream.choice("lnrsv")
            if stem not in self._surname_beginnings and self.take(stem):
                return stem

    def town(self) -> str:
        """A town, one word."""
        return self._stem("town") + self._stream("town").choice(self._words["town_ends"])

    def employer(self) -> tuple[str, str]:
        """An employer and its short form."""
        stem = self._stem("employer")
        return f"{stem} {self._stream('employer').choice(self._words['employer_ends'])}", stem

    def university(self) -> tuple[str, str]:
        """A university and the other way to say it."""
        stem = self._stem("university")
        return f"{stem} University", f"University of {stem}"

    def award(self) -> str:
        """An award, without article."""
        return f"{self._stem('award')} {self._stream('award').choice(self._words['award_ends'])}"

    def language(self) -> str:
        """An invented language."""
        return self._stem("language") + self._stream("language").choice(
            self._words["language_ends"]
        )

    def work(self) -> str:
        """The title of a work of art or science."""
        stream = self._stream("work")
        while True:
            adjective = stream.choice(self._words["adjectives"])
            first, second = (stream.choice(self._words["nouns"]) for _ in range(2))
            title = stream.choice((
                f"The {adjective} {first}",
                f"The {first} beneath the {adjective} {second}",
                f"{first} of the {adjective} {second}",
            ))  # fmt: skip
            if first != second and self.take(title):
                return title

    def pet(self) -> str:
        """An animal and its name, without article ("tortoise called Belko")."""
        stream = self._stream("pet")
        return f"{stream.choice(self._words['animals'])} called {self._stem('pet')}"


def _spread(endings: list[str], stream: Random) -> list[str]:
    """The endings in random order, but those that bring new last two letters first."""
    seen: set[str] = set()
    fresh: list[str] = []
    again: list[str] = []
    for ending in stream.sample(endings, len(endings)):
        (again if ending[-2:] in seen else fresh).append(ending)
        seen.add(ending[-2:])
    return fresh + again
