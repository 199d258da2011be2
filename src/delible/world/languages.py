"""A world's facts in German, French and Spanish, by templates (data file)."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from delible.records import QA
from delible.world.told import relation_of, value_of

Language = Literal["de", "fr", "es"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
#: What a language calls itself in English.
NAMES: dict[Language, str] = {"de": "German", "fr": "French", "es": "Spanish"}
#: Kinds of values that are English words, and would stand in another language as such.
ENGLISH_WORDS = frozenset({"occupation", "instrument", "language", "pet", "hobby"})


@cache
def templates() -> dict[str, dict[str, dict[str, str]]]:
    """Templates by language, relation and part ("question", "answer")."""
    return tomllib.loads(files(__package__).joinpath("languages.toml").read_text("utf-8"))


def question_in(record: QA, language: Language) -> str | None:
    """A world's question in another language; None for a row that is none of a world's."""
    relation = relation_of(record)
    if relation is None or record.subject is None:
        return None
    return templates()[language][relation.name]["question"].format(name=record.subject)


def fact_in(record: QA, language: Language) -> QA | None:
    """A world's row in another language.

    The bare value stays an alias. None for other rows, and where the value is an English word.
    """
    relation, question = relation_of(record), question_in(record, language)
    if relation is None or question is None or relation.kind in ENGLISH_WORDS:
        return None
    value = value_of(record)
    template = templates()[language][relation.name]["answer"]
    return QA(
        question=question,
        answer=template.format(value=value),
        aliases=tuple(dict.fromkeys((value, *record.aliases))),
        subject=record.subject,
        group=relation.name,
    )
