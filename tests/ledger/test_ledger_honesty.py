"""Sentences of the ledger that would be wrong if nobody looked: each is made wrong here."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ledger_at_work import SENTINELS, TODAY, rows

from delible.achieved import Achieved, Change, Said
from delible.errors import DelibleError, RunError
from delible.files import write_json
from delible.ledger import signing
from delible.ledger.applying import Ways, apply
from delible.ledger.chain import Event, canonical, event_hash, following
from delible.ledger.checking import check
from delible.ledger.evidence import run_facts
from delible.ledger.export import FORMAT, VERSION, head_of, read_in, write_export
from delible.ledger.form import read_wanted
from delible.ledger.policy import Policy
from delible.ledger.private import expire, withdraw
from delible.ledger.requests import add, overlaps, requests_of
from delible.ledger.store import Draft, Ledger
from delible.ledger.verifying import verify
from delible.system.artefact import Artefact, Base, write
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox

NAME = f"{SENTINELS[0]} 1"


def entered(ledger: Ledger, *rows: dict[str, str]) -> list[Any]:
    return add(ledger, read_wanted([{"models": "m", **row} for row in rows], {}, today=TODAY))[0]


class Work:
    """Writes a run as unlearn does, with a text in it."""

    def __init__(self, during: Any = None) -> None:
        self.during, self.done = during, list[str]()

    def __call__(self, start: str, request: Any, *, out: Path, **options: Any) -> Any:
        if self.during:
            self.during()
        (out / "data").mkdir(parents=True, exist_ok=True)
        (out / "data" / "forget.jsonl").write_text(str(request.forget))
        (out / "weights").write_text("w")
        write(Artefact(kind="model", base=Base(name=start), parts={"w": "weights"}), out)
        write_json(out / "manifest.json", {"status": "done"})
        self.done.append(out.name)
        self.achieved = Achieved(
            {"forget": Change(0.8, 0.1, None, 1, 0.0, Said(1, 0, None, 1)),
             "retain": Change(0.5, 0.5, None, 1, 0.0)}, "more", "less",
        )  # fmt: skip
        return self


# ---- what a request holds


def test_who_asks_for_a_name_asks_for_more_than_a_record_about_it(
    ledger: Ledger, tmp_path: Path
) -> None:
    record = {"question": "Where was Cato Lind born?", "answer": "In Ulm.", "subject": "Cato Lind"}
    one, name = entered(ledger, {"id": "a", **record}, {"id": "b", "subjects": "CATÓ  Lind"})
    assert [other.kind for other in overlaps(name, [one])] == ["names"]
    work = Work()
    told = apply(ledger, "m", Policy.build("t"), Ways(work))
    assert [(done.request, done.what) for done in told] == [("a", "applied"), ("b", "applied")]
    again, record_again = entered(
        ledger, {"id": "c", "subjects": "cato lind"}, {"id": "d", **record}
    )
    assert [other.kind for other in overlaps(again, [name])] == ["same"]
    assert [other.kind for other in overlaps(record_again, [one])] == ["same"]
    told = apply(ledger, "m", Policy.build("t"), Ways(work))
    assert [done.what for done in told] == ["covered", "covered"]


def test_names_without_letters_are_told_apart(ledger: Ledger) -> None:
    first, second, third = entered(
        ledger, {"subjects": "☂ ☃"}, {"subjects": "☺"}, {"subjects": "☂  ☃"}
    )
    assert overlaps(second, [first]) == []
    assert [one.kind for one in overlaps(third, [first])] == ["same"]


# ---- texts


def test_a_text_that_is_missing_or_there_again_is_found(ledger: Ledger, tmp_path: Path) -> None:
    entered(ledger, {"id": "a", "subjects": "Mirabel Ostrander;Tobin Reyes"})
    kept = tmp_path / "kept.json"
    write_export(ledger, kept, texts=True)
    with sqlite3.connect(ledger.path) as connection:
        row = connection.execute("SELECT * FROM texts WHERE field = 'subjects.1'").fetchone()
        connection.execute("DELETE FROM texts WHERE field = 'subjects.1'")
    assert ledger.faults() == ["the text 'subjects.1' of the request a is missing"]
    content = json.loads(kept.read_text())
    del content["texts"]["a"]["subjects.0"]
    write_json(tmp_path / "cut.json", content)
    with pytest.raises(RunError, match=r"'subjects.0' of the request a is missing"):
        verify(tmp_path / "cut.json")
    withdraw(ledger, "a", requests_of(ledger.events())["a"])
    assert ledger.faults() == []
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("INSERT INTO texts VALUES (?, ?, ?, ?)", row)
    assert "the texts of the request a went, and are there again" in ledger.faults()


def test_texts_are_read_in_where_the_events_are_known_but_never_those_that_went(
    ledger: Ledger, tmp_path: Path
) -> None:
    entered(ledger, {"id": "a", "subjects": NAME}, {"id": "b", "subjects": "Tobin Reyes"})
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    write_export(ledger, bare)
    write_export(ledger, full, texts=True)
    copied, _ = read_in(bare, tmp_path / "copy.sqlite")
    assert "texts of these requests are not in it: a, b" in " ".join(verify(copied.path))
    assert read_in(full, copied.path)[1] == 0
    assert copied.texts() == ledger.texts()
    assert "not in it" not in " ".join(verify(copied.path))
    withdraw(copied, "a", requests_of(copied.events())["a"])
    read_in(full, copied.path)
    assert set(copied.texts()) == {"b"}


def test_a_name_that_events_tell_is_told_of(ledger: Ledger) -> None:
    entered(ledger, {"id": "mirabel-ostrander", "subjects": "Mirabel Ostrander"})
    entered(ledger, {"id": "b", "subjects": "Tobin Reyes"})
    everyone = requests_of(ledger.events())
    assert withdraw(ledger, "mirabel-ostrander", everyone["mirabel-ostrander"]).named == (2,)
    assert withdraw(ledger, "b", everyone["b"]).named == ()


def test_texts_stay_while_somebody_works_with_them(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, 2, keep_until="2026-03-05"))
    told = []

    def during() -> None:
        with pytest.raises(RunError, match="another process carries out requests at m"):
            withdraw(ledger, "q-2", requests_of(ledger.events())["q-2"])
        assert expire(ledger, TODAY.replace(day=30)) == []
        told.append(True)

    apply(ledger, "m", Policy.build("t"), Ways(Work(during)))
    assert len(told) == 2
    assert [one.left for one in expire(ledger, TODAY.replace(day=30))] == [(), ()]
    words = [word.encode() for word in SENTINELS]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not any(word in path.read_bytes() for word in words), path


def test_a_clock_that_jumped_ahead_erases_nothing(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    add(ledger, rows(1, keep_until="2026-03-05"))
    far = TODAY.replace(year=2099)
    assert expire(ledger, far) == []
    assert "days after the last event of the ledger" in caplog.text
    assert "q-1" in ledger.texts()
    ledger.clock = lambda: f"{far}T10:00:00+00:00"
    ledger.append(Draft("noted"))
    assert [one.request for one in expire(ledger, far)] == ["q-1"]


# ---- looking again


class Says(BlackBox):
    def __init__(self, name: str, says: str | None = "No.", fails: Exception | None = None) -> None:
        self.name, self.says, self.fails, self.fingerprint = name, says, fails, name

    def generate(self, prompts: Any, decoding: Decoding) -> list[str | NoAnswer]:
        if self.fails is not None:
            raise self.fails
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str | NoAnswer:
        if self.says is None or "2 born" in prompt.messages[-1].text:
            return NoAnswer("away")
        return self.says


def carried_out(ledger: Ledger, identity: str = "i") -> None:
    forget = {"before": "1", "after": "0", "rows": 2, "texts_only": True,
              "said": {"before": 2, "after": 0, "rows": 2}}  # fmt: skip
    artefact = {"kind": "model", "identity": identity, "base": None}
    body = {"run": "r", "method": "npo", "files": {"w": "00"}, "manifest": "0",
            "achieved": {"state": "forgotten", "forget": forget}, "artefact": artefact}  # fmt: skip
    ledger.append(Draft("applied", "q-1", "m", body))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    signing.make_key(tmp_path / "owner.pem")
    return tmp_path / "owner.pem"


def certificate(ledger: Ledger, key: Path) -> Any:
    from delible.ledger.certifying import certify

    return certify(ledger, "q-1", "m", signing.private_key(key), key.parent / "c")


def predicate(ledger: Ledger, key: Path) -> dict[str, Any]:
    return certificate(ledger, key).content["predicate"]  # type: ignore[no-any-return]


LEAK = f"{SENTINELS[1]} 1"


def test_nothing_answered_undoes_no_leak_and_other_systems_are_named(
    ledger: Ledger, key: Path
) -> None:
    add(ledger, rows(1))
    carried_out(ledger)
    assert check(ledger, "m", Says("small", LEAK))[0].outcome == "leaks"
    assert check(ledger, "m", Says("small", None))[0].outcome == "not asked"
    told = predicate(ledger, key)
    assert told["verdict"] == {"label": "leaks", "words": "It is said again by small."}
    assert [one["outcome"] for one in told["tested"][1:]] == ["leaks", "not asked"]
    check(ledger, "m", Says("i"))
    told = predicate(ledger, key)
    assert told["verdict"]["label"] == "asked plainly only"
    assert told["verdict"]["words"].endswith(
        "At the last look i did not say it again. Before, it was said again by small."
    )
    assert not any("was made from the artefact" in one for one in told["not_tested"])
    check(ledger, "m", Says("small"))
    told = predicate(ledger, key)
    assert told["verdict"]["words"].endswith("At the last look small did not say it again.")
    assert "Whether small was made from the artefact above." in told["not_tested"]


def test_a_look_before_it_was_carried_out_says_nothing_about_it(ledger: Ledger, key: Path) -> None:
    add(ledger, rows(1))
    ledger.append(Draft("guarded", "q-1", "m", {"targets": "t.yaml"}))
    check(ledger, "m", Says("guard", LEAK))
    assert requests_of(ledger.events())["q-1"].progress["m"].leaks
    ledger.append(Draft("unguarded", "q-1", "m", {"targets": "t.yaml", "why": "x"}))
    assert not requests_of(ledger.events())["q-1"].progress["m"].leaks
    ledger.append(Draft("guarded", "q-1", "m", {"targets": "t.yaml"}))
    check(ledger, "m", Says("guard", LEAK))
    told = predicate(ledger, key)
    assert told["verdict"]["label"] == "leaks"
    assert "Whether a guard that goes by its entry stands before the model." in told["not_tested"]
    carried_out(ledger)
    assert not requests_of(ledger.events())["q-1"].progress["m"].leaks
    told = predicate(ledger, key)
    assert "The system was not asked again after it was carried out." in told["not_tested"]
    assert len(told["tested"]) == 1


def test_what_only_an_attack_brings_out_is_not_said_when_asked(ledger: Ledger, key: Path) -> None:
    from delible.audit.result import AuditResult, VerdictResult

    def audit(label: Any) -> Any:
        verdict = VerdictResult(label=label, reasons=[], thresholds={})
        return lambda system, request: AuditResult(
            systems={}, splits={}, measurements=[], verdict=verdict, not_tested=[]
        )

    add(ledger, rows(1))
    carried_out(ledger)
    check(ledger, "m", Says("s"), audit=audit("suppression"))
    words = predicate(ledger, key)["verdict"]["words"]
    assert words == "Asked or attacked, it is said again by s."
    (looked,) = check(ledger, "m", Says("s"), audit=audit("undetermined"))
    assert looked.outcome == "holds"
    assert looked.told.endswith("; the audit could not decide")
    told = predicate(ledger, key)["verdict"]
    assert told["label"] == "undetermined"
    assert told["words"].startswith("The audit could not decide. At the last look s did not")


def test_records_that_were_not_answered_are_told(ledger: Ledger, key: Path) -> None:
    record = {"id": "q-1", "models": "m", "answer": "In Ulm."}
    given = [{**record, "question": f"Where was Cato {number} born?"} for number in (1, 2, 3)]
    add(ledger, read_wanted(given, {}, today=TODAY))
    carried_out(ledger)
    (looked,) = check(ledger, "m", Says("s"))
    assert looked.outcome == "holds"
    assert "1 of 3 records were not asked about, or not answered" in looked.told
    told = predicate(ledger, key)["not_tested"]
    assert "1 of its records: s was not asked about them, or did not answer." in told


def test_an_error_of_one_request_stops_no_other_and_tells_no_secret(ledger: Ledger) -> None:
    add(ledger, rows(1))
    carried_out(ledger)
    (looked,) = check(ledger, "m", Says("s", fails=ValueError(f"no row for {NAME}")))
    assert (looked.outcome, looked.told) == ("not asked", "ValueError: no row for …")


# ---- files that are verified


@pytest.fixture
def made(ledger: Ledger, tmp_path: Path, key: Path) -> Path:
    """A certificate about a run that is there."""
    add(ledger, rows(1, 2))
    run = tmp_path / "runs" / "q-1-0"
    run.mkdir(parents=True)
    (run / "weights").write_bytes(b"numbers")
    write(Artefact(kind="model", base=Base(name="m"), parts={"w": "weights"}), run)
    write_json(run / "manifest.json", {"status": "done"})
    body = {**run_facts(run), "run": "runs/q-1-0", "method": "npo", "achieved": None}
    ledger.append(Draft("applied", "q-1", "m", body))
    return certificate(ledger, key).envelope  # type: ignore[no-any-return]


def forged(made: Path, change: Any, name: str = "forged.json") -> Path:
    """The certificate with another statement, signed by nobody."""
    envelope = json.loads(made.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement = change(statement) or statement
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    write_json(made.with_name(name), envelope)
    return made.with_name(name)


def every_place(content: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else (
        enumerate(content) if isinstance(content, list) else ()
    )  # fmt: skip
    return [one for key, value in inner for one in ((*way, key), *every_place(value, (*way, key)))]


def spoiled(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in way[:-1]:
        inner = inner[key]
    if value is None:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return content


def test_whatever_is_spoiled_is_one_message(ledger: Ledger, made: Path, tmp_path: Path) -> None:
    """Every field of the certificate, its envelope and an export: away, or of another kind."""
    export = tmp_path / "e.json"
    write_export(ledger, export, texts=True, key=signing.private_key(tmp_path / "owner.pem"))
    envelope = json.loads(made.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    place = tmp_path / "spoiled.json"
    for value in (None, 7, [], "\ud800"):
        for way in every_place(statement):
            forged(made, lambda _, way=way, value=value: spoiled(statement, way, value))
            quietly(made.with_name("forged.json"), against=export)
        for content in (envelope, json.loads(export.read_text())):
            for way in every_place(content):
                place.write_text(json.dumps(spoiled(content, way, value)))
                quietly(place, against=export, key=tmp_path / "owner.pem.pub")


def quietly(path: Path, **options: Any) -> None:
    with suppress(DelibleError):
        verify(path, **options)


def test_an_export_of_another_kind_with_valid_hashes_is_one_message(
    ledger: Ledger, tmp_path: Path
) -> None:
    event = ledger.events()[0].as_json()
    for field, value in (("body", []), ("time", 5), ("request", ["q"]), ("sequence", True)):
        spoilt = {**event, field: value}
        content = {key: one for key, one in spoilt.items() if key != "hash"}
        with pytest.raises(TypeError, match=r"of another kind|no object"):
            Event.from_json({**spoilt, "hash": event_hash(content)})
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("UPDATE events SET body = '[]'")
    assert "no JSON, or of another kind" in ledger.faults()[0]
    with pytest.raises(RunError, match="of another kind"):
        ledger.events()


@pytest.mark.parametrize(
    ("kind", "request_id"), [("checked", "unheard-of"), ("requested", "r-9"), ("scoped", "q-1")]
)
def test_events_that_tell_of_nothing_are_not_taken_in(
    ledger: Ledger, tmp_path: Path, kind: str, request_id: str
) -> None:
    """Their hashes are valid: anybody can compute hashes."""
    whole = [*ledger.events()]
    whole.append(following(whole[-1], whole[-1].time, kind, request_id))
    path, other = tmp_path / "made-up.json", tmp_path / "other.sqlite"
    content = {"format": FORMAT, "version": VERSION, **head_of(whole)}
    path.write_text(json.dumps({**content, "events": [one.as_json() for one in whole]}))
    for use in (verify, lambda file: read_in(file, other)):
        with pytest.raises(RunError, match="do not tell of requests"):
            use(path)
    assert not other.exists()


def test_a_certificate_without_an_event_or_about_others_is_found(
    ledger: Ledger, made: Path
) -> None:
    def without_last(statement: Any) -> None:
        statement["predicate"]["events"].pop()

    with pytest.raises(RunError, match="leaves out events of request q-1"):
        verify(forged(made, without_last), against=ledger.path)

    def of_another(statement: Any) -> None:
        statement["predicate"]["request"]["hash"] = ledger.events()[2].hash
        statement["subject"][0]["digest"]["sha256"] = ledger.events()[2].hash

    with pytest.raises(RunError, match="its hash is not that of request q-1"):
        verify(forged(made, of_another), against=ledger.path)

    def of_another_ledger(statement: Any) -> None:
        statement["predicate"]["ledger"]["root"] = "0" * 64

    with pytest.raises(RunError, match="the ledger's root is not the one"):
        verify(forged(made, of_another_ledger), against=ledger.path)

    def other_files(statement: Any) -> None:
        statement["subject"].pop()

    with pytest.raises(RunError, match="its subjects are not"):
        verify(forged(made, other_files))


def test_what_came_after_a_certificate_is_told(ledger: Ledger, made: Path, tmp_path: Path) -> None:
    assert verify(made, against=ledger.path)[-1] == (
        f"{ledger.path} has the events that it names, and notes it."
    )

    def other_words(statement: Any) -> None:
        statement["predicate"]["verdict"]["words"] = "All is well."

    told = verify(forged(made, other_words), against=ledger.path)
    assert "does not note it" in told[-1]
    check(ledger, "m", Says("s", LEAK), only=["q-1"])
    withdraw(ledger, "q-1", requests_of(ledger.events())["q-1"])
    assert verify(made, against=ledger.path)[-1].endswith(
        "notes it. Since then the request was: checked (leaks), withdrawn."
    )


def test_no_certificate_is_about_files_that_were_changed(
    ledger: Ledger, made: Path, key: Path
) -> None:
    run = ledger.path.parent / "runs" / "q-1-0"
    gone = "The files of the artefact: they were not there any more."
    assert gone not in predicate(ledger, key)["not_tested"]
    (run / "weights").write_bytes(b"others")
    with pytest.raises(RunError, match="made for request q-1 was changed since"):
        certificate(ledger, key)
    run.rename(run.with_name("away"))
    assert gone in predicate(ledger, key)["not_tested"]


def test_no_option_is_passed_over(ledger: Ledger, made: Path, tmp_path: Path) -> None:
    public, export = tmp_path / "owner.pem.pub", tmp_path / "e.json"
    write_export(ledger, export)
    with pytest.raises(RunError, match=r"a ledger is not signed, its exports are"):
        verify(ledger.path, key=public)
    with pytest.raises(RunError, match="nobody signed it"):
        verify(ledger.path, key=public, against=export)
    write_export(ledger, export, key=signing.private_key(tmp_path / "owner.pem"))
    assert "is signed by the key" in verify(ledger.path, key=public, against=export)[-1]
    for path in (ledger.path, export):
        with pytest.raises(RunError, match="only a certificate is about a run"):
            verify(path, run=tmp_path / "runs" / "q-1-0")


def test_one_signature_of_several_must_be_the_keys(made: Path, tmp_path: Path) -> None:
    public = tmp_path / "owner.pem.pub"
    strange = {"keyid": "ab", "sig": base64.b64encode(b"x" * 64).decode()}
    envelope = json.loads(made.read_text())
    mine = envelope["signatures"][0]
    place = tmp_path / "several.json"
    for signatures in ([mine, strange], [strange, mine], [{**mine, "keyid": "other"}]):
        write_json(place, {**envelope, "signatures": signatures})
        assert "Signed by the key" in " ".join(verify(place, key=public))
    for signatures, told in (([strange], "not signed by this key"), ([], "nobody signed it"),
                             ([{**mine, "sig": ""}], "signature does not fit")):  # fmt: skip
        write_json(place, {**envelope, "signatures": signatures})
        with pytest.raises(RunError, match=told):
            verify(place, key=public)


def test_an_envelope_of_another_type_is_no_certificate(made: Path, tmp_path: Path) -> None:
    envelope, place = json.loads(made.read_text()), tmp_path / "other.json"
    write_json(place, {**envelope, "payloadType": signing.HEAD})
    for options in ({}, {"key": tmp_path / "owner.pem.pub"}):
        with pytest.raises(RunError, match=r"it holds '.*ledger-head\+json', not"):
            verify(place, **options)


def test_keyed_hashes_are_made_as_the_page_says(ledger: Ledger) -> None:
    (one,) = entered(ledger, {"subjects": "Ada  Quill-Ström", "asker": "ADA quill ström"})
    key = bytes.fromhex(ledger.key_path.read_text().strip())

    def by_hand(word: bytes) -> str:
        return hmac.new(key, word + b"\0adaquillstrom", hashlib.sha256).hexdigest()

    assert one.asker == by_hand(b"asker")
    assert one.about == one.named == {by_hand(b"name")}
    (fact,) = entered(ledger, {"question": "Where IS  Ulm?", "answer": "Süd."})
    text = b'fact\0["qa", "where is ulm?", "s\\u00fcd."]'
    assert fact.marks == {hmac.new(key, text, hashlib.sha256).hexdigest()}
    assert ledger.events()[0].body["key"] == hashlib.sha256(key).hexdigest()[:16]


def test_a_public_key_that_was_never_written_is_made_from_the_private_one(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public, known = signing.make_key(tmp_path / "k.pem")
    written = public.read_bytes()
    public.unlink()
    assert signing.make_key(tmp_path / "k.pem") == (public, known)
    assert public.read_bytes() == written


def test_keys_are_sorted_by_their_units_as_in_rfc_8785() -> None:
    """Section 3.2.3: U+1F600 is two units, of which the first is less than U+FB33."""
    assert canonical({"\ufb33": 1, "\U0001f600": {"b": [], "a": 2}, "\r": 3}).decode() == (
        '{"\\r":3,"\U0001f600":{"a":2,"b":[]},"\ufb33":1}'
    )
