"""``delible verify``: is this certificate, export or ledger what it was when it was written?

Needs no model. What can be said without a public key is that a file is whole in itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import RunError
from delible.ledger import signing
from delible.ledger.chain import Event
from delible.ledger.export import (
    FORMAT,
    check_signature,
    continues,
    head_of,
    read_export,
    read_json,
)
from delible.ledger.stated import check_artefact, check_events, check_statement
from delible.ledger.store import Ledger
from delible.ledger.texts import without_texts

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_SQLITE = b"SQLite format 3\0"
#: Requests that a sentence names.
SHOWN = 5


def verify(
    path: Path, *, key: Path | None = None, against: Path | None = None, run: Path | None = None
) -> list[str]:
    """Looks at a certificate, an export or a ledger.

    Args:
        key: Public key of whoever signed it.
        against: An earlier export, or for a certificate the ledger or an export of it.
            A ledger is signed by nobody: there the key is the export's.
        run: The run directory whose artefact a certificate is about.

    Returns:
        What was found right, in sentences.

    Raises:
        RunError: What is wrong.
    """
    public = None if key is None else signing.public_key(key)
    try:
        with path.open("rb") as handle:
            start = handle.read(len(_SQLITE))
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path)) from None
    if start == _SQLITE:
        _no_run(run, path)
        return _ledger(path, public, against)
    if start.lstrip().startswith(b"<"):
        raise RunError(
            "this is the page for people.", where=str(path), hint="Verify the .json beside it."
        )
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        _no_run(run, path)
        return _export(path, content, public, against)
    if isinstance(content, dict) and "payloadType" in content:
        return _certificate(path, content, public, against, run)
    raise RunError("this is neither a certificate nor an export nor a ledger.", where=str(path))


def _no_run(run: Path | None, path: Path) -> None:
    if run is not None:
        raise RunError(
            "only a certificate is about a run.", where=str(path), hint="Leave out --run."
        )


def _ledger(path: Path, public: Ed25519PublicKey | None, against: Path | None) -> list[str]:
    if public is not None and against is None:
        raise RunError(
            "a ledger is not signed, its exports are.",
            where=str(path),
            hint="Add --against EXPORT, whose signature the key is for, or leave out --key.",
        )
    ledger = Ledger(path)
    if wrong := ledger.faults():
        raise RunError(f"{wrong[0]}.", where=str(path))
    events = ledger.events()
    head = head_of(events)
    found = [
        f"The ledger holds {len(events)} events, whole and in order.",
        f"Its root is {head['root']}.",
    ]
    found += _away(events, ledger.texts())
    return found + _goes_on(events, against, str(path), public)


def _away(events: Sequence[Event], texts: Mapping[str, Any]) -> list[str]:
    """Which requests' texts are missing, although nothing says that they went."""
    away = without_texts(events, texts)
    names = f"{', '.join(away[:SHOWN])}{', …' if len(away) > SHOWN else ''}"
    return [f"The texts of these requests are not in it: {names}."] if away else []


def _export(
    path: Path, content: Any, public: Ed25519PublicKey | None, against: Path | None
) -> list[str]:
    export = read_export(path, content)
    found = [
        f"The export holds {len(export.events)} events, whole and in order.",
        f"Its root is {export.head['root']}.",
    ]
    if public is not None:
        check_signature(export, public, str(path))
        found.append(f"Signed by the key {signing.key_id(public)[:16]}.")
    else:
        found.append(_unsigned("it" if export.signature is None else None))
    found += _away(export.events, export.texts)
    return found + _goes_on(export.events, against, str(path), None)


def _goes_on(
    events: Sequence[Event], against: Path | None, where: str, public: Ed25519PublicKey | None
) -> list[str]:
    """Against an earlier export, which the key must have signed if there is one."""
    if against is None:
        return []
    earlier = read_export(against)
    continues(events, earlier, where)
    found = [f"It begins with the {earlier.head['size']} events of {against}."]
    if public is not None:
        check_signature(earlier, public, str(against))
        found.append(f"{against} is signed by the key {signing.key_id(public)[:16]}.")
    return found


def _certificate(
    path: Path, content: Any, public: Ed25519PublicKey | None, against: Path | None,
    run: Path | None,
) -> list[str]:  # fmt: skip
    where = str(path)
    if public is None:
        data, _ = signing.parts(content, signing.STATEMENT, where)
        signed = _unsigned(None)
    else:
        data = signing.opened(content, signing.STATEMENT, public, where)
        signed = f"Signed by the key {signing.key_id(public)[:16]}."
    try:
        read = json.loads(data)
    except ValueError:
        raise RunError("what was signed is no JSON.", where=where) from None
    statement = check_statement(read, where)
    told = statement["predicate"]
    name = told["request"]["id"]
    found = [
        f"A certificate of request {name} at {told['model']}, made {told['made']}.",
        f"Its verdict: {told['verdict']['label']}. {told['verdict']['words']}",
        signed,
    ]
    if run is not None:
        check_artefact(statement, run)
        found.append(f"The files in {run} are those that it is about.")
    if against is not None:
        events = _events(against)
        check_events(statement, events, str(against))
        found.append(_since(statement, events, hashlib.sha256(data).hexdigest(), str(against)))
    return found


def _since(statement: Mapping[str, Any], events: Sequence[Event], digest: str, where: str) -> str:
    """What a ledger says of a certificate, and of its request since."""
    told = statement["predicate"]
    after = [
        one
        for one in events[told["ledger"]["size"] :]
        if one.request == told["request"]["id"] and one.model in (None, told["model"])
    ]
    noted = any(one.kind == "certified" and one.body.get("statement") == digest for one in after)
    found = f"{where} has the events that it names, and {'notes' if noted else 'does not note'} it."
    later = [
        f"{one.kind} ({one.body['outcome']})" if "outcome" in one.body else one.kind
        for one in after
        if one.kind != "certified"
    ]
    return f"{found} Since then the request was: {', '.join(later)}." if later else found


def _events(path: Path) -> list[Event]:
    with path.open("rb") as handle:
        is_ledger = handle.read(len(_SQLITE)) == _SQLITE
    if not is_ledger:
        return list(read_export(path).events)
    ledger = Ledger(path)
    if wrong := ledger.faults():
        raise RunError(f"{wrong[0]}.", where=str(path))
    return ledger.events()


def _unsigned(what: str | None) -> str:
    if what is not None:
        return "Nobody signed it: it is whole in itself, and anybody can have made it."
    return "Who signed it was not looked at: --key FILE.pub does."
