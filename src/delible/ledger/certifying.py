"""Writing a certificate: the signed statement, and its page."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import RunError
from delible.files import atomic_file
from delible.ledger import signing
from delible.ledger.evidence import file_hashes
from delible.ledger.export import sound
from delible.ledger.requests import Request, Texts, named, requests_of
from delible.ledger.statement import payload, statement
from delible.ledger.store import Draft, Ledger
from delible.report.certificate import write_certificate
from delible.system.questions import ask

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class Certificate:
    """What was written.

    Attributes:
        envelope: The signed statement.
        page: The page for people.
        key: Id of the key that signed.
    """

    envelope: Path
    page: Path
    key: str
    content: dict[str, Any]


def certify(
    ledger: Ledger,
    name: str,
    model: str,
    key: Ed25519PrivateKey,
    out: Path,
    *,
    shown: Texts | None = None,
) -> Certificate:
    """Writes ``ID.json`` and ``ID.html``, and notes in the ledger what was signed.

    Args:
        out: Their folder.
        shown: The page shows these texts; the signed statement never does.

    Raises:
        RunError: The ledger, or what the request's run made, is not as it was written.
        DataError: Nothing was done that could be certified.
    """
    events = sound(ledger)
    request = named(requests_of(events), name)
    there = _files_are_there(ledger, request, model)
    content = statement(events, request, model, made=ledger.clock(), there=there)
    data = payload(content)
    envelope = signing.sealed(signing.STATEMENT, data, key)
    digest, keyid = hashlib.sha256(data).hexdigest(), signing.key_id(key.public_key())
    several = re.sub(r"[^A-Za-z0-9._-]+", "-", f"-{model}") if len(request.models) > 1 else ""
    path = out / f"{name}{several}.json"
    with atomic_file(path) as handle:
        json.dump(envelope, handle, indent=1)
        handle.write("\n")
    signed = {"sha256": digest, "key": keyid, "file": path.name}
    page = write_certificate(path.with_suffix(".html"), content, signed, _hidden(shown))
    ledger.append(Draft("certified", name, model, {"statement": digest, "key": keyid}))
    return Certificate(path, page, keyid, content)


def _files_are_there(ledger: Ledger, request: Request, model: str) -> bool:
    """Whether what a request's run made still lies where it was.

    Raises:
        RunError: It was changed.
    """
    progress = request.progress.get(model)
    if progress is None or progress.applied is None:
        return True
    folder = ledger.path.parent / progress.applied.body["run"]
    if not folder.is_dir():
        return False
    if file_hashes(folder) != progress.applied.body["files"]:
        raise RunError(
            f"what was made for request {request.id} was changed since.",
            where=str(folder),
            hint="A certificate is about those files: put them back.",
        )
    return True


def _hidden(texts: Texts | None) -> dict[str, Any] | None:
    if texts is None:
        return None
    prompts = [ask(record) for record in texts.records]
    questions = [one.messages[-1].text for one in prompts if one is not None and one.messages]
    return {"asker": texts.asker, "subjects": texts.subjects, "questions": questions}
