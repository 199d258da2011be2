"""What a memory holds: items, the forms by which equal texts are told, and what is found.

An item is one thing that is remembered, whatever its kind: a case, a demonstration, an entry for
retrieval, a summary. Its parents are the items that it was made from; they may carry over what they
say, so whoever forgets one of them has to look at its descendants.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

#: What an item may be called by default; any other word is a kind, too.
ENTRY, CASE, DEMONSTRATION, SUMMARY = "entry", "case", "demonstration", "summary"
State = Literal["active", "quarantined"]


class Item(BaseModel):
    """One thing that is remembered.

    Attributes:
        text: All that it says. It is the unit of forgetting, so it stands for itself: a case holds
            its question and its plan.
        id: Stays the same as long as it is there; empty: one is made when it is added.
        kind: A word: case, demonstration, entry, summary …
        key: By what it is found; empty: by its text.
        subject: Whom or what it is about.
        source: Where it is from: a user, a document, a run.
        data: Anything else as plain JSON, such as a reward. It goes with the item.
        parents: Ids of the items that it was made from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    id: str = ""
    kind: str = Field(ENTRY, min_length=1)
    key: str = ""
    subject: str = ""
    source: str = ""
    data: dict[str, JsonValue] = Field(default_factory=dict)
    parents: tuple[str, ...] = ()

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not near(text):
            raise ValueError("says nothing")
        return text

    @field_validator("parents")
    @classmethod
    def _each_once(cls, parents: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(parents)))

    @property
    def found_by(self) -> str:
        """The key, or the text if there is none."""
        return self.key or self.text

    def canonical(self) -> str:
        """Everything about it as one line of JSON, the same for equal items."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    def says(self) -> tuple[str, ...]:
        """Every text that it holds, each once: text, key, and the strings of its data."""
        return tuple(dict.fromkeys(one for one in (self.text, self.key, *strings(self.data))
                                   if one))  # fmt: skip


class Found(BaseModel):
    """An item and how well it fits a query.

    Attributes:
        score: BM25 (>= 0) where words were looked for, the cosine [-1, 1] where meaning was;
            higher = fits better.
    """

    model_config = ConfigDict(frozen=True)

    item: Item
    score: float


def near(text: str) -> str:
    """A text without what people change when they paste it: case, spaces, width, invisible signs.

    Texts with equal near forms count as the same text.
    """
    if text.isascii():
        return " ".join(text.casefold().replace("\0", " ").split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    shown = "".join(one for one in folded if unicodedata.category(one) != "Cf")
    return " ".join(shown.replace("\0", " ").split())


def strings(value: Any) -> list[str]:
    """All strings in plain data, the names of its fields left out."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [one for part in value.values() for one in strings(part)]
    if isinstance(value, list | tuple):
        return [one for part in value for one in strings(part)]
    return []


__all__ = ["CASE", "DEMONSTRATION", "ENTRY", "SUMMARY", "Found", "Item", "State", "near", "strings"]
