"""Private texts beside the events: what an event holds of them, and what is wrong with them.

Private text: SHA-256("delible ledger text v1" 0x00 salt 0x00 text): without the salt, which goes
              with the text, nobody can try texts against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from delible.ledger.chain import Event

#: Events with which the texts of a request go.
ERASING = ("withdrawn", "erased")
_TEXT = b"delible ledger text v1\0"


@dataclass(frozen=True)
class PrivateText:
    """A text, and the salt of its hash."""

    salt: str
    content: str

    def __post_init__(self) -> None:
        if not (isinstance(self.salt, str) and isinstance(self.content, str)):
            raise TypeError("a text or its salt is of another kind")
        (self.salt + self.content).encode()  # half of a letter is a ValueError


def commitment(salt: str, text: str) -> str:
    """What an event holds of a private text (hexadecimal)."""
    return hashlib.sha256(_TEXT + salt.encode() + b"\0" + text.encode()).hexdigest()


def text_faults(
    events: Sequence[Event], texts: Mapping[str, Mapping[str, PrivateText]]
) -> list[str]:
    """Texts that are not those that the events were written with, in sentences.

    That all texts of a request are away is no fault: exports leave them out. Some are.
    """
    known = _known(events)
    gone = _gone(events)
    found = []
    for request, fields in texts.items():
        written = known.get(request, {})
        found += [
            f"the text '{field}' of the request {request} was changed"
            for field, text in fields.items()
            if written.get(field) != commitment(text.salt, text.content)
        ]
        found += [
            f"the text '{field}' of the request {request} is missing"
            for field in written
            if fields and field not in fields
        ]
        if fields and request in gone:
            found.append(f"the texts of the request {request} went, and are there again")
    return found


def without_texts(
    events: Sequence[Event], texts: Mapping[str, Mapping[str, PrivateText]]
) -> list[str]:
    """Requests whose texts are away, and no event says that they went."""
    gone = _gone(events)
    return [name for name in _known(events) if name not in gone and not texts.get(name)]


def _known(events: Sequence[Event]) -> dict[str, dict[str, str]]:
    """Hashes of texts by request and field."""
    return {
        str(event.request): dict(event.body["texts"])
        for event in events
        if isinstance(event.body.get("texts"), Mapping)
    }


def _gone(events: Sequence[Event]) -> set[str | None]:
    return {event.request for event in events if event.kind in ERASING}
