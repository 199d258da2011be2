"""Values that mean the same in every format: numbers and dates as text, conversations as turns.

CSV knows nothing but text, Parquet fills every key of a struct with null, pandas marks what is
missing with NaN. What the formats do differently is made alike here, before a record is built;
what is left out or read otherwise than it stands is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

from delible.errors import DataError
from delible.loaders.formats import describe

#: Options of a choice that have a column each.
OPTIONS = ("option1", "option2", "option3", "option4")
#: Fields of records that hold a text, and those that hold a list of texts.
TEXTS = ("question", "answer", "text", "subject", "neighbour_of", "group", "client", *OPTIONS)
TEXT_LISTS = ("aliases", "paraphrases", "paraphrased_answers", "perturbed")
#: Lists of texts that are not a record's own field, or that must be a list.
_LISTS = (*TEXT_LISTS, "options", "answers")
#: What speakers are called, here and in ShareGPT, Gemini and OpenAI files.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
#: Keys of a turn that say something which a dialogue cannot hold.
_ACTIONS = ("tool_calls", "function_call")
_KEPT = ("tool_calls", "tool_call_id")


@dataclass
class Notes:
    """What a source holds that was not used, or was read otherwise than it stands.

    Attributes:
        unused: Title of a form -> columns that were not used.
        keys: Keys of turns that were not used.
        numbers: Column -> the first number that was read as a text.
    """

    unused: dict[str, list[str]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The notes on turns and numbers."""
        found = []
        if self.keys:
            listed = ", ".join(f"'{key}'" for key in self.keys)
            found.append(f"keys of messages not used: {listed}.")
        for name, first in self.numbers.items():
            found.append(f"numbers in '{name}' are read as text, such as \"{first}\".")
        return found


def is_missing(value: Any) -> bool:
    """Null, and the NaN with which pandas marks what is missing."""
    return value is None or (isinstance(value, float) and value != value)


def is_number(value: Any) -> bool:
    """A number or a date: what CSV holds as a text."""
    return isinstance(value, int | float | Decimal | date) and not isinstance(value, bool)


def as_text(value: Any, name: str, notes: Notes) -> Any:
    """A number or a date as the text that CSV would hold; anything else as it is."""
    if not is_number(value):
        return value
    notes.numbers.setdefault(name, str(value))
    return str(value)


def with_texts(
    fields: Mapping[str, Any], notes: Notes, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The fields of a record with texts where they belong.

    Args:
        names: Field -> the source's name for it, for the notes.
    """
    names, found = names or {}, dict(fields)
    for name, value in fields.items():
        shown = names.get(name, name)
        if name in TEXTS:
            found[name] = as_text(value, shown, notes)
        elif name in _LISTS and isinstance(value, list | tuple):
            found[name] = [as_text(one, shown, notes) for one in value]
    return found


def has_number(values: Any) -> bool:
    """Whether some of the values are numbers or dates that become texts."""
    return isinstance(values, list | tuple) and any(is_number(value) for value in values)


def turns(messages: Any, name: str, where: str, notes: Notes) -> Any:
    """The turns of a conversation as ``{"role": …, "content": …}``, with calls of tools.

    Known are ``role`` and ``content`` (chat formats) and ``from`` and ``value`` (ShareGPT).

    Raises:
        DataError: A last turn that does something else than to say something.
    """
    if not isinstance(messages, list | tuple):
        return messages
    last = len(messages) - 1
    return [
        _turn(message, f"{name}[{place}]", where, notes, last=place == last)
        if isinstance(message, Mapping)
        else message
        for place, message in enumerate(messages)
    ]


def _turn(
    message: Mapping[str, Any], name: str, where: str, notes: Notes, *, last: bool
) -> dict[str, Any]:
    left = {str(key): value for key, value in message.items() if not is_missing(value)}
    shared = "role" not in left and "from" in left
    speaker, said = ("from", "value") if shared else ("role", "content")
    for key in _ACTIONS:
        if left.get(key) and (last or key not in _KEPT):
            raise DataError(
                f"'{name}' has '{key}': a turn that calls a tool is no text to learn or forget.",
                where=where,
                hint="Keep the turns that are texts.",
            )
    found = {key: value for key in _KEPT if (value := left.pop(key, None))}
    if speaker in message:
        role = left.pop(speaker, None)
        found["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    if said in message:
        found["content"] = _content(left.pop(said, None), f"{name}.{said}", where, notes)
    notes.keys += [key for key in left if key not in notes.keys]
    return found


def _content(value: Any, name: str, where: str, notes: Notes) -> Any:
    """A turn's text; its parts joined, if they all are texts, else as they are."""
    if not isinstance(value, list | tuple):
        return as_text(value, name, notes)
    if any(isinstance(part, Mapping) and part.get("type") == "image" for part in value):
        return [
            part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in value
        ]
    texts = list[str]()
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise DataError(
                f"'{name}' has a part that is no text ({kind or describe(part)}).",
                where=where,
                hint="Keep the conversations that are texts.",
            )
        texts.append(text)
    return "".join(texts)
