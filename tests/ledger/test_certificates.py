"""Signed statements, exports, and what ``delible verify`` says of spoiled ones."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_at_work import SENTINELS, rows

from delible.errors import DataError, RunError
from delible.files import write_json
from delible.ledger import chain, signing
from delible.ledger.export import read_in, write_export
from delible.ledger.requests import add, requests_of, texts_of
from delible.ledger.store import Draft, Ledger
from delible.ledger.verifying import verify

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


# ---- keys and envelopes


def test_what_is_signed_is_the_encoding_of_the_protocol() -> None:
    """The example of the DSSE protocol, and a payload in which lengths count bytes."""
    assert signing.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert signing.pae("é", "é ".encode()) == b"DSSEv1 2 \xc3\xa9 3 \xc3\xa9 "


def test_the_signature_is_ed25519_over_it() -> None:
    """RFC 8032, section 7.1, test 2: the secret key, and its public key."""
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(secret)
    envelope = signing.sealed("t", b"\x72", key)
    other = ed25519.Ed25519PublicKey.from_public_bytes(public)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    other.verify(signature, b"DSSEv1 1 t 1 r")
    prefix = bytes.fromhex("302a300506032b6570032100")  # SubjectPublicKeyInfo of Ed25519
    assert envelope["signatures"][0]["keyid"] == hashlib.sha256(prefix + public).hexdigest()
    assert signing.opened(envelope, "t", other, "here") == b"r"


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "k.pem"
    public, known = signing.make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.key_id(signing.public_key(public)) == known
    assert signing.key_id(signing.private_key(path).public_key()) == known
    with pytest.raises(RunError, match="a key already"):
        signing.make_key(path)
    path.chmod(0o640)
    with pytest.raises(RunError, match=r"others may read this key.*chmod 600"):
        signing.private_key(path)
    with pytest.raises(RunError, match="no public Ed25519 key"):
        signing.public_key(path)
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(RunError, match="no private Ed25519 key"):
        signing.private_key(path)


# ---- exports


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signing.make_key(tmp_path / "owner.pem")
    return tmp_path / "owner.pem"


@pytest.fixture
def full(ledger: Ledger) -> Ledger:
    add(ledger, rows(1, 2, named=True))
    ledger.append(Draft("erased", "q-1", body={"reason": "term"}, erase=True))
    return ledger


@pytest.mark.parametrize("texts", [True, False])
def test_out_and_in_again_is_identical(
    full: Ledger, tmp_path: Path, key: Path, texts: bool
) -> None:
    signer = signing.private_key(key)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    write_export(full, first, texts=texts, key=signer)
    copy, added = read_in(first, tmp_path / "copy.sqlite")
    assert added == 4
    write_export(copy, second, texts=texts, key=signer)
    assert first.read_bytes() == second.read_bytes()
    assert copy.events() == full.events()
    assert copy.faults() == []
    assert copy.texts() == (full.texts() if texts else {})
    assert any(word in first.read_text() for word in SENTINELS) == texts
    full.append(Draft("noted"))
    write_export(full, first, texts=texts)
    assert read_in(first, copy.path)[1] == 1, "a later export goes on"
    copy.append(Draft("other"))
    full.append(Draft("noted"))
    write_export(full, first)
    with pytest.raises(RunError, match="does not go on"):
        read_in(first, copy.path)


def test_texts_that_have_gone_do_not_come_back(full: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    write_export(full, path, texts=True)
    copy, _ = read_in(path, tmp_path / "copy.sqlite")
    full.append(Draft("withdrawn", "q-2", body={"reason": "asked"}, erase=True))
    write_export(full, path, texts=True)
    read_in(path, copy.path)
    assert copy.texts() == {}


def change(content: Any, place: int, **fields: Any) -> None:
    content["events"][place] |= fields


def forge(content: Any) -> None:
    """Rewrites an event and all that follow, as somebody can who knows how."""
    events: list[chain.Event] = []
    for one in content["events"]:
        body = {**one["body"], "basis": "licence"} if one["kind"] == "requested" else one["body"]
        last = events[-1] if events else None
        events.append(
            chain.following(last, one["time"], one["kind"], one["request"], one["model"], body)
        )
    content["events"] = [one.as_json() for one in events]
    content["head"], content["root"] = events[-1].hash, chain.root([one.hash for one in events])


def shortened(content: Any) -> None:
    content["events"].pop()
    content["size"] -= 1
    content["head"] = content["events"][-1]["hash"]
    content["root"] = chain.root([one["hash"] for one in content["events"]])


SPOILED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "changed": (lambda c: change(c, 1, time="2000-01-01"), "event 2 was changed"),
    "body": (lambda c: c["events"][1]["body"].update(basis="x"), "event 2 was changed"),
    "missing": (lambda c: c["events"].pop(1), "missing, added or in another order"),
    "first": (lambda c: c["events"].pop(0), "does not follow the beginning"),
    "reordered": (lambda c: c["events"].insert(1, c["events"].pop(2)), "another order"),
    "truncated": (lambda c: c["events"].pop(), "stands for 4 events and holds 3: it was cut"),
    "root": (lambda c: c.update(root="0" * 64), "'root' is not that of its events"),
    "ledger": (lambda c: c.update(ledger="x"), "'ledger' is not that of its events"),
    "field": (lambda c: c["events"][1].pop("time"), "lacks a field"),
    "no root": (lambda c: c.pop("root"), "'root' is missing"),
    "text": (lambda c: c["texts"]["q-2"]["records.0"].update(content="x"), "'records.0' of the"),
    "salt": (lambda c: c["texts"]["q-2"]["records.0"].update(salt="x"), "'records.0' of the"),
    "newer": (lambda c: c.update(version=2), "has the form 2, this delible knows 1"),
    "forged": (forge, "signature is that of another state"),
    "shortened": (shortened, "signature is that of another state"),
    "unsigned": (lambda c: c.pop("signature"), "nobody signed it"),
    "payload": (lambda c: c["signature"].update(payload="e30="), "was changed after it was signed"),
    "envelope": (lambda c: c["signature"].pop("payload"), "no whole DSSE envelope"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_export_fails_with_what_is_wrong(
    full: Ledger, tmp_path: Path, key: Path, name: str
) -> None:
    path, public = tmp_path / "e.json", signing.public_path(key)
    write_export(full, path, texts=True, key=signing.private_key(key))
    assert verify(path, key=public)[-1].startswith("Signed by the key")
    spoil, told = SPOILED[name]
    content = json.loads(path.read_text())
    spoil(content)
    write_json(path, content)
    with pytest.raises(RunError) as error:
        verify(path, key=public)
    assert told in str(error.value)
    path.write_text(path.read_text()[:200])
    with pytest.raises(RunError, match="no whole JSON"):
        verify(path)


def test_a_past_that_was_changed_shows_against_an_earlier_export(
    full: Ledger, tmp_path: Path
) -> None:
    earlier, later = tmp_path / "earlier.json", tmp_path / "later.json"
    write_export(full, earlier)
    full.append(Draft("noted"))
    write_export(full, later)
    assert verify(later, against=earlier)[-1].startswith("It begins with the 4 events")
    assert verify(full.path, against=earlier)[-1].startswith("It begins with the 4 events")
    content = json.loads(later.read_text())
    forge(content)
    write_json(later, content)
    verify(later)
    with pytest.raises(RunError, match="its past was changed"):
        verify(later, against=earlier)
    with pytest.raises(RunError, match="its past was changed"):
        verify(earlier, against=later)


# ---- certificates


def applied(ledger: Ledger, tmp_path: Path, **more: Any) -> Path:
    """A run with an artefact, and the event that says it was carried out."""
    from delible.ledger.evidence import run_facts
    from delible.system.artefact import Artefact, Base, write

    run = tmp_path / "runs" / "q-2-0"
    run.mkdir(parents=True)
    (run / "weights").write_bytes(b"numbers")
    artefact = Artefact(kind="patch", base=Base(name="m"), parts={"p": "weights"}, identity="i")
    write(artefact, run)
    write_json(run / "manifest.json", {"status": "done", "examples": ["x"]})
    forget = {"before": "0.8", "after": "0.05", "rows": 4, "texts_only": False,
              "said": {"before": 4, "after": 0, "rows": 4}}  # fmt: skip
    body = {**run_facts(run), "run": "runs/q-2-0", "method": "rocr", "kept": "0.98",
            "achieved": {"state": "forgotten", "forget": forget}, **more}  # fmt: skip
    ledger.append(Draft("started", "q-2", "m", {"run": "runs/q-2-0", "method": "rocr"}))
    ledger.append(Draft("applied", "q-2", "m", body))
    return run


def certified(ledger: Ledger, tmp_path: Path, key: Path, **options: Any) -> Any:
    from delible.ledger.certifying import certify

    return certify(ledger, "q-2", "m", signing.private_key(key), tmp_path / "c", **options)


def test_a_certificate_is_an_in_toto_statement_that_anybody_can_read(
    full: Ledger, tmp_path: Path, key: Path
) -> None:
    """Opened here by hand, with no code of the project."""
    run = applied(full, tmp_path)
    made = certified(full, tmp_path, key)
    envelope = json.loads(made.envelope.read_text())
    payload = base64.b64decode(envelope["payload"])
    statement = json.loads(payload)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    digests = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert digests["runs/q-2-0/weights"] == hashlib.sha256(b"numbers").hexdigest()
    artefact = (run / "artefact.yaml").read_bytes()
    assert digests["runs/q-2-0/artefact.yaml"] == hashlib.sha256(artefact).hexdigest()
    asked = next(one for one in full.events() if one.request == "q-2")
    assert digests["request q-2"] == asked.hash
    told = statement["predicate"]
    assert told["request"]["texts"]["records.0"] == asked.body["texts"]["records.0"]
    assert told["verdict"]["label"] == "asked plainly only"
    assert told["verdict"]["words"] == (
        "Asked plainly, the right answers went from a probability of 0.8 to 0.05; "
        "0 of 4 answers are said (4 before)."
    )
    assert "Nothing was attacked" in " ".join(told["not_tested"])
    encoding = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    signing.public_key(signing.public_path(key)).verify(signature, encoding)
    last = full.events()[-1]
    assert (last.kind, last.body["statement"]) == ("certified", hashlib.sha256(payload).hexdigest())


def test_neither_file_nor_page_tells_what_was_forgotten_unless_asked(
    full: Ledger, tmp_path: Path, key: Path
) -> None:
    applied(full, tmp_path)
    made = certified(full, tmp_path, key)
    data = base64.b64decode(json.loads(made.envelope.read_text())["payload"]).decode()
    for text in (data, made.page.read_text()):
        assert not [word for word in SENTINELS if word in text]
        assert "removed" not in text.lower()
    page = made.page.read_text()
    assert all(str(value) in page for value in ("rocr", "0.8", "0.05", "0 of 4", made.key))
    assert "http" not in page.replace("http-equiv", "")
    texts = texts_of(full.texts("q-2")["q-2"])
    made = certified(full, tmp_path, key, shown=texts)
    assert all(word in made.page.read_text() for word in (SENTINELS[0], SENTINELS[2]))
    assert (
        SENTINELS[0]
        not in base64.b64decode(json.loads(made.envelope.read_text())["payload"]).decode()
    )


@pytest.mark.parametrize(
    ("checked", "label"),
    [
        ({"outcome": "holds", "audit": None}, "asked plainly only"),
        ({"outcome": "leaks", "audit": None}, "leaks"),
        ({"outcome": "holds", "audit": {"verdict": "removal-consistent"}}, "removal-consistent"),
        ({"outcome": "leaks", "audit": {"verdict": "suppression"}}, "leaks"),
        ({"outcome": "holds", "audit": {"verdict": "undetermined"}}, "undetermined"),
    ],
)
def test_the_verdict_is_that_of_the_last_look(
    full: Ledger, tmp_path: Path, key: Path, checked: dict[str, Any], label: str
) -> None:
    applied(full, tmp_path)
    body = {"system": "s", "fingerprint": None, "numbers": None, **checked}
    if body["audit"]:
        body["audit"] |= {"attacks": [], "not_tested": ["Nothing deep."], "depth": "quick"}
    full.append(Draft("checked", "q-2", "m", body))
    made = certified(full, tmp_path, key)
    assert made.content["predicate"]["verdict"]["label"] == label
    plain = "Nothing was attacked" in " ".join(made.content["predicate"]["not_tested"])
    assert plain == (checked["audit"] is None)


def test_what_was_not_done_is_not_certified(full: Ledger, tmp_path: Path, key: Path) -> None:
    with pytest.raises(DataError, match=r"was not carried out at m \(it is open\)"):
        certified(full, tmp_path, key)
    full.append(Draft("guarded", "q-2", "m", {"targets": "t.yaml"}))
    made = certified(full, tmp_path, key)
    assert made.content["predicate"]["verdict"]["label"] == "guarded"
    assert made.content["predicate"]["done"]["weights_changed"] is False
    assert "not changed" in made.page.read_text()


def test_a_certificate_is_verified_against_key_run_and_ledger(
    full: Ledger, tmp_path: Path, key: Path
) -> None:
    run = applied(full, tmp_path)
    made = certified(full, tmp_path, key)
    public = signing.public_path(key)
    found = verify(made.envelope, key=public, run=run, against=full.path)
    assert len(found) == 5
    assert "not looked at: --key" in " ".join(verify(made.envelope))
    other, _ = signing.make_key(tmp_path / "other.pem")
    with pytest.raises(RunError, match="not signed by this key"):
        verify(made.envelope, key=other)
    with pytest.raises(RunError, match="page for people"):
        verify(made.page)
    strange = tmp_path / "strange.json"
    strange.write_text("{}")
    with pytest.raises(RunError, match="neither a certificate nor"):
        verify(strange)
    (run / "weights").write_bytes(b"other numbers")
    with pytest.raises(RunError, match="'weights' was changed"):
        verify(made.envelope, key=public, run=run)
    envelope = json.loads(made.envelope.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["verdict"]["label"] = "removal-consistent"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    write_json(made.envelope, envelope)
    with pytest.raises(RunError, match="changed after it was signed"):
        verify(made.envelope, key=public)


def test_a_certificate_shows_a_ledger_whose_past_was_changed(
    full: Ledger, tmp_path: Path, key: Path
) -> None:
    applied(full, tmp_path)
    made, path = certified(full, tmp_path, key), tmp_path / "e.json"
    write_export(full, path)
    verify(made.envelope, against=path)
    content = json.loads(path.read_text())
    forge(content)
    write_json(path, content)
    with pytest.raises(RunError, match="event 3 of the ledger is not the one"):
        verify(made.envelope, against=path)


def test_the_manifest_has_the_same_hash_when_the_texts_have_gone(
    full: Ledger, tmp_path: Path
) -> None:
    from delible.ledger.evidence import manifest_hash
    from delible.ledger.private import withdraw

    run = applied(full, tmp_path)
    before = manifest_hash(run)
    withdraw(full, "q-2", requests_of(full.events())["q-2"])
    assert json.loads((run / "manifest.json").read_text())["examples"] == []
    assert manifest_hash(run) == before
    write_json(run / "manifest.json", {"status": "other"})
    assert manifest_hash(run) != before


def test_a_changed_ledger_is_neither_exported_nor_certified(
    full: Ledger, tmp_path: Path, key: Path
) -> None:
    import sqlite3

    applied(full, tmp_path)
    with sqlite3.connect(full.path) as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("UPDATE events SET time = 'x' WHERE sequence = 2")
    for work in (lambda: write_export(full, tmp_path / "e.json"),
                 lambda: certified(full, tmp_path, key)):  # fmt: skip
        with pytest.raises(RunError, match="event 2 was changed"):
            work()
    assert not (tmp_path / "e.json").exists()
