"""Memories of a request: forgotten once, whatever dies; told, and looked at again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_at_work import SENTINELS, TODAY, in_child, killed_at, rows
from test_checking import Says

from delible.errors import DataError
from delible.ledger.applying import Ways, apply
from delible.ledger.checking import check
from delible.ledger.form import Wanted, read_wanted
from delible.ledger.guarding import Done
from delible.ledger.memories import sought
from delible.ledger.policy import Policy
from delible.ledger.private import withdraw
from delible.ledger.requests import Request, add, requests_of, texts_of
from delible.ledger.statement import statement
from delible.ledger.store import Ledger
from delible.memory import Item, Memory, database, steps
from delible.report.certificate import render_certificate

NAME, PLACE, _ = SENTINELS
ABOUT = [
    Item(id="by-subject", text=f"Was born in {PLACE} 1", subject=f"{NAME} 1", kind="case"),
    Item(id="by-name", text=f"{NAME.upper()} 1 keeps bees", key="Who keeps bees?"),
    Item(id="child", text="Somebody has a honeycomb", kind="summary", parents=("by-name",)),
]
OTHERS = [Item(id=f"o-{n}", text=f"Neighbour number {n} grows turnips") for n in range(5)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(os, "fsync", lambda _: None)


def filled(folder: Path, items: list[Item] = [*OTHERS, *ABOUT]) -> Memory:  # noqa: B006
    memory = Memory(folder)
    memory.add(items)
    return memory


def no_training(*_: Any, **__: Any) -> Any:
    raise DataError("nobody trains here")


def carry_out(ledger: Ledger, tmp_path: Path, **options: Any) -> list[Done]:
    """By guards alone, unless a policy is given."""
    guards = {"rules": [{"guard": True}], "guard": {"targets": tmp_path / "targets.yaml"}}
    policy = options.pop("policy", None) or Policy.build("t", **guards)
    return apply(ledger, "m", policy, Ways(no_training), **options)


def what(done: list[Done]) -> list[tuple[str, str]]:
    return [(one.request, one.what) for one in done]


def request(ledger: Ledger, name: str = "q-1") -> Request:
    return requests_of(ledger.events())[name]


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def asked(memories: str, *numbers: int) -> list[Wanted]:
    return rows(*numbers or (1,), memories=memories)


def test_it_goes_with_all_that_was_made_from_it(ledger: Ledger, tmp_path: Path) -> None:
    memory = filled(tmp_path / "notes")
    never = filled(tmp_path / "never", OTHERS[1:])
    memory.forget(ids=["o-0"])  # not for this request
    assert PLACE.encode() in bytes_of(tmp_path / "notes")
    add(ledger, asked(str(tmp_path / "notes")))
    done = carry_out(ledger, tmp_path)
    assert what(done) == [("q-1", "forgotten"), ("q-1", "guarded")]
    assert "1 of the kind case, 1 of the kind entry, 1 of the kind summary removed" in done[0].told
    assert memory.state == never.state
    left = bytes_of(tmp_path / "notes")
    for gone in (PLACE, NAME, NAME.upper(), "honeycomb", "by-name"):
        assert gone.encode() not in left, gone
    assert b"turnips" in left
    (forgot,) = [one for one in ledger.events() if one.kind == "forgot"]
    assert forgot.model is None
    assert forgot.body["removed"] == {"case": 1, "entry": 1, "summary": 1}
    assert forgot.body["verdict"] == "nothing found"
    assert forgot.body["seen_before"] == forgot.body["pieces"] > 5
    assert forgot.body["state"] == memory.state
    told = json.dumps([one.as_json() for one in ledger.events()])
    assert not [word for word in SENTINELS if word in told]
    size = len(ledger.events())
    assert what(carry_out(ledger, tmp_path)) == [("q-1", "guarded")], "it is done once"
    assert (len(ledger.events()), len(memory.deletions())) == (size, 2)
    assert ledger.faults() == []


def test_nothing_to_delete_is_done_too_and_says_what_was_looked_for(
    ledger: Ledger, tmp_path: Path
) -> None:
    memory = filled(tmp_path / "notes", OTHERS)
    add(ledger, asked(str(tmp_path / "notes" / "memory.db")))
    first, second = carry_out(ledger, tmp_path)
    assert (first.what, second.what) == ("forgotten", "guarded")
    assert "no item held it, none removed; nothing found" in first.told
    (forgot,) = [one for one in ledger.events() if one.kind == "forgot"]
    assert forgot.body["removed"] == {}
    assert forgot.body["pieces"] > 0
    assert memory.deletions() == []
    assert len(memory) == len(OTHERS)


def test_too_short_to_be_looked_for_is_not_shown(ledger: Ledger, tmp_path: Path) -> None:
    filled(tmp_path / "notes", OTHERS)
    content = [{"id": "s", "models": "m", "question": "Who?", "answer": "I",
                "memories": str(tmp_path / "notes")}]  # fmt: skip
    add(ledger, read_wanted(content, {}, today=TODAY))
    carry_out(ledger, tmp_path)
    (forgot,) = [one for one in ledger.events() if one.kind == "forgot"]
    assert forgot.body["verdict"] == "not shown"
    assert any("too short" in one for one in forgot.body["not_shown"])
    assert len(Memory(tmp_path / "notes")) == len(OTHERS)


def test_a_question_that_names_nobody_is_looked_for_and_one_that_does_is_not() -> None:
    """Else a question that many are asked would take the others' items along."""
    content = [
        {"id": "s", "models": "m", "question": "Where does she live?", "answer": "Casta"},
        {"id": "s", "question": "Where does she live?", "answer": "Rome", "subject": "Ada"},
        {"id": "s", "text": "Ben Orr was a miller."},
    ]
    (one,) = read_wanted(content, {}, today=TODAY)
    from delible.ledger.requests import Texts

    wanted = sought(Texts(one.records, one.subjects))
    assert wanted.names == ("Ada",)
    assert wanted.texts == (
        "Where does she live?", "Where does she live?\nRome", "Ben Orr was a miller.",
    )  # fmt: skip


def test_one_part_that_cannot_be_done_leaves_the_others(ledger: Ledger, tmp_path: Path) -> None:
    here, gone = tmp_path / "notes", tmp_path / "nowhere"
    filled(here)
    add(ledger, asked(f"{gone};{here}"))
    training = Policy.build("t", rules=[{"method": "npo"}])
    done = carry_out(ledger, tmp_path, policy=training)
    assert what(done) == [("q-1", "failed"), ("q-1", "forgotten"), ("q-1", "failed")]
    assert "holds no memory" in done[0].told
    assert not gone.exists()
    assert {place: one.word for place, one in request(ledger).remembered.items()} == {
        str(gone): "failed", str(here): "forgotten",
    }  # fmt: skip
    filled(gone)
    assert what(carry_out(ledger, tmp_path)) == [("q-1", "forgotten"), ("q-1", "guarded")]
    kinds = [one.kind for one in ledger.events()]
    assert (kinds.count("forgetting"), kinds.count("forgot")) == (2, 2)
    assert not request(ledger).memories_left
    assert not request(ledger).open


def test_it_is_done_after_the_weights_have_been_and_not_once_it_is_withdrawn(
    ledger: Ledger, tmp_path: Path
) -> None:
    add(ledger, asked(str(tmp_path / "notes"), 1, 2))
    carry_out(ledger, tmp_path)
    assert request(ledger).open
    filled(tmp_path / "notes")
    withdraw(ledger, "q-2", request(ledger, "q-2"))
    assert what(carry_out(ledger, tmp_path)) == [("q-1", "forgotten"), ("q-1", "guarded")]
    assert not request(ledger, "q-2").open


def test_errors_tell_no_secret(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "notes")

    def breaks(*_: Any, **__: Any) -> Any:
        raise ValueError(f"cannot delete {NAME} 1")

    monkeypatch.setattr(Memory, "forget", breaks)
    add(ledger, asked(str(tmp_path / "notes")))
    first, _ = carry_out(ledger, tmp_path)
    assert first.told == f"memory {tmp_path / 'notes'}: ValueError: cannot delete …"
    assert NAME not in str([one.as_json() for one in ledger.events()])


# ---- looking again, and what is said


def test_what_comes_back_is_found_and_forgotten_again(ledger: Ledger, tmp_path: Path) -> None:
    memory = filled(tmp_path / "notes")
    add(ledger, asked(str(tmp_path / "notes")))
    carry_out(ledger, tmp_path)
    looked = check(ledger, "m", Says(()))
    assert [(one.request, one.outcome) for one in looked] == [("q-1", "holds"), ("q-1", "holds")]
    assert "no item holds it" in looked[0].told
    memory.add([Item(text=f"{NAME} 1 came to tea", id="new")])
    memory.add([Item(text="There was tea", parents=("new",))])
    first, _ = check(ledger, "m", Says(()))
    assert (first.outcome, first.told) == (
        "leaks", f"memory {tmp_path / 'notes'}: items that hold it are there again (1)",
    )  # fmt: skip
    one = request(ledger)
    assert one.open
    assert one.remembered[str(tmp_path / "notes")].word == "it is back"
    content = statement(ledger.events(), one, "m", made="now")["predicate"]
    assert content["verdict"]["label"] == "leaks"
    again, _ = carry_out(ledger, tmp_path)
    assert "1 of the kind case, 3 of the kind entry, 1 of the kind summary" in again.told
    assert len(memory) == len(OTHERS)
    assert request(ledger).remembered[str(tmp_path / "notes")].word == "forgotten"


def test_files_that_hold_it_and_memories_that_are_away(ledger: Ledger, tmp_path: Path) -> None:
    filled(tmp_path / "notes")
    add(ledger, asked(str(tmp_path / "notes")))
    carry_out(ledger, tmp_path)
    (tmp_path / "notes" / "backup").write_text(f"Was born in {PLACE} 1: {NAME} 1")
    first, _ = check(ledger, "m", Says(()))
    assert (first.outcome, "remains found" in first.told) == ("leaks", True)
    (tmp_path / "notes").rename(tmp_path / "away")
    first, _ = check(ledger, "m", Says(()))
    assert (first.outcome, "holds no memory" in first.told) == ("not asked", True)


def test_remains_are_for_a_person_and_known_at_the_next_look(
    ledger: Ledger, tmp_path: Path
) -> None:
    filled(tmp_path / "notes")
    (tmp_path / "notes" / "backup").write_text(f"Was born in {PLACE} 1: {NAME} 1")
    add(ledger, asked(str(tmp_path / "notes")))
    first, _ = carry_out(ledger, tmp_path)
    assert (first.what, "remains found" in first.told) == ("held", True)
    assert what(carry_out(ledger, tmp_path)) == [("q-1", "guarded")]
    assert [one.outcome for one in check(ledger, "m", Says(()))] == ["as before", "holds"]


def test_the_certificate_says_what_went_and_what_nobody_knows(
    ledger: Ledger, tmp_path: Path
) -> None:
    place = str(tmp_path / "notes")
    filled(tmp_path / "notes")
    add(ledger, asked(place))
    with pytest.raises(DataError, match="was not carried out"):
        statement(ledger.events(), request(ledger), "m", made="now")
    training = Policy.build("t", rules=[{"method": "npo"}])
    carry_out(ledger, tmp_path, policy=training)
    content = statement(ledger.events(), request(ledger), "m", made="now")
    told = content["predicate"]
    assert told["verdict"] == {
        "label": "memories only", "words": "Memories of it forgot; the model itself is unchanged.",
    }  # fmt: skip
    assert told["done"] == {"kind": "memories", "weights_changed": False, "guarded": False}
    (memory,) = told["memories"]
    assert (memory["memory"], memory["state"]) == (place, "forgotten")
    assert memory["forgot"]["verdict"] == "nothing found"
    assert f"The memory {place} was not searched again after it forgot." in told["not_tested"]
    assert any("backups" in one and one.startswith(f"Memory {place}: ")
               for one in told["not_tested"])  # fmt: skip
    kinds = [one["kind"] for one in told["events"]]
    assert kinds == ["requested", "forgetting", "forgot", "started", "failed"]
    signed = {"sha256": "s", "key": "k", "file": "q-1.json"}
    page = render_certificate(content, signed)
    assert "1 case, 1 entry, 1 summary" in page
    assert "no guard stands" in page
    carry_out(ledger, tmp_path)
    told = statement(ledger.events(), request(ledger), "m", made="now")["predicate"]
    assert told["verdict"]["label"] == "guarded"
    check(ledger, "m", Says(()))
    content = statement(ledger.events(), request(ledger), "m", made="now")
    assert not any("was not searched" in one for one in content["predicate"]["not_tested"])
    assert ": holds" in render_certificate(content, signed)


# ---- killed


def work(folder: Path, before: Callable[[str], None]) -> None:
    """Carries it out; writes of the ledger and steps of the memory count alike."""
    steps.reached = before
    ledger = Ledger(folder / "l.sqlite", before=before)
    carry_out(ledger, folder)


def ended_as(folder: Path) -> Any:
    ledger, memory = Ledger(folder / "l.sqlite"), Memory(folder / "notes")
    assert ledger.faults() == []
    (forgot,) = [one.body for one in ledger.events() if one.kind == "forgot"]
    left = bytes_of(folder / "notes")
    assert not [word for word in (PLACE, NAME, "honeycomb") if word.encode() in left]
    return (
        memory.state, len(memory.deletions()), forgot["removed"], forgot["verdict"],
        request(ledger).remembered[str(folder / "notes")].word, request(ledger).progress["m"].state,
    )  # fmt: skip


def test_killed_at_any_write_it_forgets_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """kill -9 before each write of ledger and memory; then the same command again."""
    real = steps.reached
    never = filled(tmp_path_factory.mktemp("never"), OTHERS)
    expected = (
        never.state, 1, {"case": 1, "entry": 1, "summary": 1}, "nothing found", "forgotten",
        "guarded",
    )  # fmt: skip
    try:
        for count in range(100):
            folder = tmp_path_factory.mktemp("killed")
            filled(folder / "notes")
            add(Ledger(folder / "l.sqlite", create=True), asked(str(folder / "notes")))
            ended = in_child(lambda folder=folder, count=count: work(folder, killed_at(count)))
            code = os.waitstatus_to_exitcode(ended)
            assert code in (0, -9)
            work(folder, lambda word: None)
            assert ended_as(folder) == expected, f"killed at write {count}"
            if code == 0:
                break
        else:
            pytest.fail("it never ended")
    finally:
        steps.reached = real
    assert count > 20


def test_the_texts_of_a_request_are_not_needed_to_say_so(ledger: Ledger, tmp_path: Path) -> None:
    filled(tmp_path / "notes")
    late = rows(1, memories=str(tmp_path / "notes"), keep_until="2026-03-01")
    add(ledger, late)
    from delible.ledger.private import expire

    expire(ledger, TODAY.replace(month=4))
    assert texts_of(ledger.texts("q-1").get("q-1", {})) is None
    done = carry_out(ledger, tmp_path)
    assert {one.what for one in done} == {"held"}
    assert all("its texts are gone" in one.told for one in done)
    assert len(Memory(tmp_path / "notes")) == len(OTHERS) + len(ABOUT)
