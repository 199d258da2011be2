"""The chain of events and the tree over it: hashes, and nothing else.

Event n:      h_n = SHA-256("delible ledger event v1" 0x00 JSON(event n without h_n)),
              where the event holds h_(n-1); h_0 is 64 zeros.
Tree:         RFC 6962, section 2.1: leaf SHA-256(0x00 h_n), node SHA-256(0x01 left right), split at
              the largest power of two below the count; over no leaves SHA-256 of nothing.
JSON:         RFC 8785 (sorted keys, no spaces, UTF-8) of data without floating-point numbers, whose
              spelling differs between languages: numbers that are not whole are written as texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST = "0" * 64
EVENT = b"delible ledger event v1\0"


@dataclass(frozen=True)
class Event:
    """Something that happened; equal content is the same event.

    Attributes:
        sequence: Its place, from 1. Events are ordered by it and not by their times.
        time: What the clock said, which may be wrong.
        kind: What happened.
        request: Id of the request that it is about.
        model: The model that it is about.
        body: What else there is to say; no private text.
        previous: Hash of the event before.
        hash: Of this one.
    """

    sequence: int
    time: str
    kind: str
    request: str | None
    model: str | None
    body: Mapping[str, Any]
    previous: str
    hash: str

    def __post_init__(self) -> None:
        texts = [self.time, self.kind, self.previous, self.hash]
        texts += [one for one in (self.request, self.model) if one is not None]
        if type(self.sequence) is not int or not all(isinstance(one, str) for one in texts):
            raise TypeError("a field of an event is of another kind")
        if not isinstance(self.body, Mapping):
            raise TypeError("the body of an event is no object")

    def content(self) -> dict[str, Any]:
        """All that the hash covers."""
        return {
            "sequence": self.sequence, "time": self.time, "kind": self.kind,
            "request": self.request, "model": self.model, "body": dict(self.body),
            "previous": self.previous,
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it."""
        return {**self.content(), "hash": self.hash}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Event:
        """What :meth:`as_json` made.

        Raises:
            TypeError: A field is missing, unknown, or of another kind.
        """
        return cls(**content)


def canonical(content: Any) -> bytes:
    """The one way to write plain data as JSON.

    Raises:
        TypeError: It holds a floating-point number, or is no plain data.
    """
    return json.dumps(_ordered(content), separators=(",", ":"), ensure_ascii=False).encode()


def _ordered(content: Any) -> Any:
    """Plain data with its keys in the order of their UTF-16 units."""
    if isinstance(content, Mapping):
        keys = sorted(content, key=lambda key: key.encode("utf-16-be"))
        return {key: _ordered(content[key]) for key in keys}
    if isinstance(content, list | tuple):
        return [_ordered(one) for one in content]
    if isinstance(content, float):
        raise TypeError(f"{content!r} is no whole number: write it as a text")
    return content


def event_hash(content: Mapping[str, Any]) -> str:
    """Hash of an event's content, the previous hash among it (hexadecimal)."""
    return hashlib.sha256(EVENT + canonical(content)).hexdigest()


def following(
    previous: Event | None,
    time: str,
    kind: str,
    request: str | None = None,
    model: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> Event:
    """The event that comes after another one."""
    sequence = 1 if previous is None else previous.sequence + 1
    before = FIRST if previous is None else previous.hash
    made = Event(sequence, time, kind, request, model, dict(body or {}), before, "")
    return Event(**{**made.content(), "hash": event_hash(made.content())})


def root(hashes: Sequence[str]) -> str:
    """Merkle tree hash over the events' hashes, in order (hexadecimal)."""
    level = [hashlib.sha256(b"\0" + bytes.fromhex(one)).digest() for one in hashes]
    return _tree(level).hex()


def _tree(leaves: Sequence[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _tree(leaves[:half]) + _tree(leaves[half:])).digest()


def faults(events: Sequence[Event]) -> list[str]:
    """What is wrong with a chain, in sentences; empty: every event is as it was written, in order.

    That events are missing at its end, the chain alone cannot tell.
    """
    found = []
    before: Event | None = None
    for place, event in enumerate(events, start=1):
        expected = FIRST if before is None else before.hash
        try:
            sound = event_hash(event.content()) == event.hash
        except (TypeError, ValueError):
            sound = False
        if not sound:
            found.append(f"event {place} was changed: it does not have the hash that it names")
        if event.sequence != place or event.previous != expected:
            found.append(
                f"at place {place} stands event {event.sequence}, which does not follow "
                f"{'the beginning' if before is None else f'event {before.sequence}'}: events "
                "are missing, added or in another order"
            )
        before = event
        if len(found) >= 3:
            break
    return found
