"""Writing a certificate: the signed statement, and its page."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.files import atomic_file
from delible.ledger import signing
from delible.ledger.export import sound
from delible.ledger.requests import Texts, named, requests_of
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
        RunError: The ledger is not as it was written.
        DataError: Nothing was done that could be certified.
    """
    events = sound(ledger)
    request = named(requests_of(events), name)
    content = statement(events, request, model, made=ledger.clock())
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


def _hidden(texts: Texts | None) -> dict[str, Any] | None:
    if texts is None:
        return None
    prompts = [ask(record) for record in texts.records]
    questions = [one.messages[-1].text for one in prompts if one is not None and one.messages]
    return {"asker": texts.asker, "subjects": texts.subjects, "questions": questions}
