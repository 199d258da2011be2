"""The ledger as one JSON file: out, in again without a difference, and verified elsewhere.

    {format, version, ledger, size, head, root, events: [...], texts: {request: {field: {salt,
     content}}}, signature: DSSE envelope over ledger, size, head and root}

Texts are only there where they were asked for, the signature where there is a key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import RunError
from delible.files import atomic_file
from delible.ledger import chain, signing
from delible.ledger.chain import Event, canonical
from delible.ledger.requests import requests_of
from delible.ledger.store import Ledger
from delible.ledger.texts import PrivateText, text_faults

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

FORMAT, VERSION = "delible ledger export", 1
_FIELDS = {"format", "version", "ledger", "size", "head", "root", "events"}


@dataclass(frozen=True)
class Export:
    """What an export holds.

    Attributes:
        texts: By request and field.
        signature: An envelope; None: nobody signed it.
    """

    events: tuple[Event, ...]
    head: Mapping[str, Any]
    texts: Mapping[str, Mapping[str, PrivateText]]
    signature: Mapping[str, Any] | None


def head_of(events: Sequence[Event]) -> dict[str, Any]:
    """What stands for all events: ledger, size, last hash and root."""
    return {
        "ledger": events[0].body.get("ledger") if events else None,
        "size": len(events),
        "head": events[-1].hash if events else chain.FIRST,
        "root": chain.root([one.hash for one in events]),
    }


def sound(ledger: Ledger) -> list[Event]:
    """The events of a ledger that is as it was written.

    Raises:
        RunError: It is not; what is wrong.
    """
    if faults := ledger.faults():
        raise RunError(f"{faults[0]}.", where=str(ledger.path), hint="Nothing was written.")
    return ledger.events()


def write_export(
    ledger: Ledger, path: Path, *, texts: bool = False, key: Ed25519PrivateKey | None = None
) -> dict[str, Any]:
    """Writes an export; the same ledger and key give the same bytes.

    Returns:
        What stands for its events.

    Raises:
        RunError: The ledger is not as it was written.
    """
    events = sound(ledger)
    head = head_of(events)
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, **head,
        "events": [one.as_json() for one in events],
    }  # fmt: skip
    if texts:
        content["texts"] = {
            request: {
                field: {"salt": one.salt, "content": one.content} for field, one in fields.items()
            }
            for request, fields in ledger.texts().items()
        }
    if key is not None:
        content["signature"] = signing.sealed(signing.HEAD, canonical(head), key)
    with atomic_file(path, private=texts) as handle:
        json.dump(content, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    return head


def read_export(path: Path, content: Any = None) -> Export:
    """Reads an export and looks whether it is whole and unchanged in itself.

    Raises:
        RunError: It is not; says what is wrong.
    """
    where = str(path)
    content = read_json(path) if content is None else content
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError("this is no export of a ledger.", where=where)
    if isinstance(content.get("version"), int) and content["version"] > VERSION:
        raise RunError(
            f"it has the form {content['version']}, this delible knows {VERSION}.",
            where=where,
            hint="A newer delible wrote it: update yours.",
        )
    if missing := sorted(_FIELDS - set(content)):
        raise RunError(f"'{missing[0]}' is missing: it was cut or changed.", where=where)
    try:
        events = tuple(Event.from_json(one) for one in content["events"])
        texts = {
            request: {field: PrivateText(**one) for field, one in fields.items()}
            for request, fields in content.get("texts", {}).items()
        }
    except (TypeError, ValueError, AttributeError):
        raise RunError(
            "an event or a text lacks a field, or has one of another kind: it was changed.",
            where=where,
        ) from None
    head = {name: content[name] for name in ("ledger", "size", "head", "root")}
    if wrong := _wrong(events, head, texts):
        raise RunError(f"{wrong}.", where=where)
    return Export(events, head, texts, content.get("signature"))


def _wrong(
    events: Sequence[Event],
    head: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, PrivateText]],
) -> str | None:
    if faults := chain.faults(events):
        return faults[0]
    try:
        requests_of(events)
    except (AttributeError, KeyError, TypeError, ValueError):  # hashes can be made for anything
        return "its events do not tell of requests as a ledger's do"
    true = head_of(events)
    if head["size"] != true["size"]:
        return f"it stands for {head['size']} events and holds {true['size']}: it was cut"
    for name in ("ledger", "head", "root"):
        if head[name] != true[name]:
            return f"its '{name}' is not that of its events: it was changed"
    found = text_faults(events, texts)
    return found[0] if found else None


def check_signature(export: Export, key: Ed25519PublicKey, where: str) -> None:
    """Whether a key signed what stands for the events of a whole export.

    Raises:
        RunError: It did not.
    """
    if export.signature is None:
        raise RunError(
            "nobody signed it: it is whole in itself, and anybody can have made it.", where=where
        )
    payload = signing.opened(export.signature, signing.HEAD, key, where)
    if payload != canonical(export.head):
        raise RunError("the signature is that of another state of the ledger.", where=where)


def continues(later: Sequence[Event], earlier: Export, where: str) -> None:
    """Whether a ledger still begins with all that an earlier export holds.

    Raises:
        RunError: It does not: its past was changed.
    """
    size = int(earlier.head["size"])
    root = chain.root([one.hash for one in later[:size]])
    if len(later) < size or root != earlier.head["root"]:
        raise RunError(
            f"it does not begin with the {size} events of the earlier export: its past was "
            "changed, or cut.",
            where=where,
        )


def read_in(path: Path, place: Path) -> tuple[Ledger, int]:
    """Takes the events of an export into a ledger, a new one or one that it goes on from.

    Raises:
        RunError: The export is not whole, or does not go on from the ledger.
    """
    export = read_export(path)
    if not export.events:
        raise RunError("it holds no events.", where=str(path))
    if place.exists() and place.stat().st_size:
        ledger = Ledger(place)
        return ledger, ledger.take_over(export.events, export.texts)
    ledger = Ledger.from_events(place, export.events, export.texts)
    return ledger, len(export.events)


def read_json(path: Path) -> Any:
    """The content of a file that is to be verified.

    Raises:
        RunError: It is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path)) from None
    except ValueError:
        raise RunError(
            "it is no whole JSON file: it was cut or changed.", where=str(path)
        ) from None
