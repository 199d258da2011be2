"""The relations between people and values, and the sentences that express them (data file)."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from delible.errors import RecipeError, nearest

Selection = int | str | Sequence[str] | None


@dataclass(frozen=True)
class Relation:
    """A relation and its templates.

    Templates have the fields ``{name}`` (the person), ``{value}`` (the answer) and ``{article}``
    (a or an, as the value asks).

    Attributes:
        kind: Kind of value: town, year, occupation, employer, work, person, ….
        phrase: For relations to people, how a chain names the person ("the teacher of …").
        short: The answer as a phrase.
        sentence: The answer as a sentence that stands alone.
        cloze: A statement with the answer cut out.
        reverse: Questions for the person, given the value.
    """

    name: str
    kind: str
    question: str
    paraphrases: tuple[str, ...]
    short: str
    short_paraphrases: tuple[str, ...]
    sentence: str
    sentence_paraphrases: tuple[str, ...]
    cloze: str
    reverse: tuple[str, ...]
    phrase: str | None = None


@cache
def relations() -> dict[str, Relation]:
    """Every relation by name, in the order in which ``relations=n`` takes them."""
    table = tomllib.loads(files(__package__).joinpath("relations.toml").read_text("utf-8"))
    return {name: _relation(name, row) for name, row in table.items()}


def _relation(name: str, row: dict[str, Any]) -> Relation:
    texts: dict[str, Any] = {
        key: tuple(text) if isinstance(text, list) else text for key, text in row.items()
    }
    return Relation(name=name, **texts)


def select(selection: Selection) -> tuple[Relation, ...]:
    """The relations that ``selection`` asks for.

    Args:
        selection: None for all, a number for the first ones, or names (their order is kept).

    Raises:
        RecipeError: A number out of range, an unknown name, a name given twice, or no name.
    """
    known = relations()
    if selection is None:
        return tuple(known.values())
    if isinstance(selection, int):
        if isinstance(selection, bool) or not 1 <= selection <= len(known):
            raise RecipeError(
                f"'relations' = {selection}: there are {len(known)}.",
                where="world",
                hint=f"Take 1 to {len(known)}, or name them.",
            )
        return tuple(known.values())[:selection]
    names = [selection] if isinstance(selection, str) else list(selection)
    for name in names:
        if name not in known:
            raise RecipeError(
                f"unknown relation '{name}'.", where="world", hint=nearest(name, known)
            )
    if not names or len(set(names)) < len(names):
        raise RecipeError(
            f"'relations' = {names}: give at least one name, each once.", where="world"
        )
    return tuple(known[name] for name in names)


def fill(template: str, name: str, value: str = "") -> str:
    """The template's text, with a capital first letter."""
    article = "an" if value[:1].casefold() in "aeiou" and value else "a"
    text = template.format(name=name, value=value, article=article)
    return text[:1].upper() + text[1:]
