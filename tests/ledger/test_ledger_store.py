"""The file of the ledger: whole or not at all, one at a time, and texts that are gone when gone."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ledger_at_work import SENTINELS, TODAY, in_child, killed_at, rows

from delible.errors import RunError
from delible.ledger import database
from delible.ledger.private import expire, withdraw
from delible.ledger.requests import add, requests_of, texts_of
from delible.ledger.store import Draft, Ledger


def holds(folder: Path, words: tuple[str, ...] = SENTINELS) -> set[str]:
    """Files below a folder in which any of the words lies as bytes."""
    return {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    }


def test_only_the_owner_reads_it_and_the_key_is_not_in_it(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1))
    for path in (ledger.path, ledger.key_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert holds(tmp_path, (ledger.key_path.read_text().strip(),)) == {ledger.key_path.name}


def test_who_asked_is_known_again_and_not_by_name(ledger: Ledger, tmp_path: Path) -> None:
    new, _ = add(ledger, rows(1, 2))
    assert new[0].asker == new[1].asker is not None
    assert not holds(tmp_path, SENTINELS[2:])
    add(ledger, rows(3, named="yes"))
    assert holds(tmp_path, SENTINELS[2:]) == {"ledger.sqlite"}
    texts = texts_of(ledger.texts("q-3")["q-3"])
    assert texts is not None
    assert texts.asker == SENTINELS[2]


def test_events_are_never_changed_through_sql(ledger: Ledger) -> None:
    with sqlite3.connect(ledger.path) as connection:
        for statement in ("UPDATE events SET time = 'x'", "DELETE FROM events"):
            with pytest.raises(sqlite3.IntegrityError, match="never"):
                connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE events SET body = '{}' WHERE sequence = 2", "event 2 was changed"),
        ("UPDATE events SET time = 'x' WHERE sequence = 2", "event 2 was changed"),
        ("DELETE FROM events WHERE sequence = 3", "head stands for"),
        ("DELETE FROM events WHERE sequence = 2", "does not follow event 1"),
        ("UPDATE events SET sequence = 9 WHERE sequence = 2", "missing, added or in another order"),
        ("UPDATE events SET body = 'x' WHERE sequence = 2", "no JSON"),
        ("UPDATE texts SET content = 'other' WHERE field = 'records.0'", "'records.0' of the req"),
    ],
)
def test_a_change_behind_its_back_is_found_and_nothing_is_added(
    ledger: Ledger, statement: str, told: str
) -> None:
    add(ledger, rows(1, 2))
    assert ledger.faults() == []
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("DROP TRIGGER events_stay")
        connection.execute("DROP TRIGGER events_last")
        connection.execute(statement)
    assert told in "\n".join(ledger.faults())
    if "sequence = 3" in statement:
        with pytest.raises(RunError, match="changed by something else"):
            ledger.append(Draft("noted"))


def test_times_may_jump_and_the_order_stays(tmp_path: Path) -> None:
    times = iter(["2030-01-01", "1970-01-01", "nonsense", "2026-01-01"])
    ledger = Ledger(tmp_path / "l", clock=lambda: next(times), create=True)
    for _ in range(3):
        ledger.append(Draft("noted"))
    assert [one.time for one in ledger.events()] == [
        "2030-01-01", "1970-01-01", "nonsense", "2026-01-01",
    ]  # fmt: skip
    assert [one.sequence for one in ledger.events()] == [1, 2, 3, 4]
    assert ledger.faults() == []


# ---- faults of the machine


def test_a_newer_form_and_other_files_are_one_message(ledger: Ledger, tmp_path: Path) -> None:
    with sqlite3.connect(ledger.path) as connection:
        connection.execute(f"PRAGMA user_version = {database.SCHEMA + 1}")
    with pytest.raises(RunError, match="has the form 2, this delible knows 1"):
        Ledger(ledger.path)
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE x (y)").connection.close()
    text = tmp_path / "text"
    text.write_text("no database, but long enough to have a head " * 40)
    for path in (other, text):
        with pytest.raises(RunError, match="this is no ledger"):
            Ledger(path)
    with pytest.raises(RunError, match="there is no ledger"):
        Ledger(tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot be opened"):
        Ledger(tmp_path)


def test_without_its_key_nothing_can_be_entered(ledger: Ledger) -> None:
    ledger.key_path.rename(ledger.path.with_name("away"))
    with pytest.raises(RunError, match="its key is missing"):
        add(ledger, rows(1))
    ledger.key_path.write_text("ab" * 32)
    with pytest.raises(RunError, match="another ledger's"):
        add(ledger, rows(1))
    assert len(ledger.events()) == 1


def test_two_writers_wait_for_each_other_and_then_say_so(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 50)
    with sqlite3.connect(ledger.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="another process is writing"):
            add(ledger, rows(1))
        other.execute("ROLLBACK")
    add(ledger, rows(1))


def test_many_processes_leave_one_chain(tmp_path: Path) -> None:
    code = (
        "import sys; from delible.ledger.store import Draft, Ledger\n"
        "for _ in range(5): Ledger(sys.argv[1], create=True).append(Draft('noted'))"
    )
    path = tmp_path / "l.sqlite"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    at_work = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment) for _ in range(3)
    ]
    assert [one.wait(60) for one in at_work] == [0, 0, 0]
    ledger = Ledger(path)
    assert ledger.faults() == []
    assert len(ledger.events()) == 16


def test_a_file_that_may_not_grow_is_told_as_a_full_disk(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ledger, rows(1))
    before = ledger.events()
    pages = ledger.path.stat().st_size // 4096
    settings = (*database.SETTINGS, f"max_page_count = {pages}")
    with monkeypatch.context() as full:
        full.setattr(database, "SETTINGS", settings)
        with pytest.raises(RunError, match="the disk is full: the ledger is as it was before"):
            add(ledger, rows(*range(2, 200)))
    assert ledger.events() == before
    add(ledger, rows(2))


def test_a_full_disk_is_one_message_and_changes_nothing(ledger: Ledger) -> None:
    add(ledger, rows(1))
    before, size = ledger.events(), ledger.path.stat().st_size

    def grow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        add(Ledger(ledger.path), rows(*range(2, 200)))

    assert os.waitstatus_to_exitcode(in_child(grow)) == 7
    assert ledger.events() == before
    assert ledger.faults() == []
    add(ledger, rows(2))


#: What a history is made of: entering so many requests, noting something, withdrawing the first.
STEPS = st.lists(st.sampled_from(["add 1", "add 3", "note", "withdraw"]), min_size=1, max_size=5)


def live(path: Path, steps: list[str], before: Callable[[str], None]) -> None:
    ledger = Ledger(path, create=True, before=before)
    for number, step in enumerate(steps):
        word, _, count = step.partition(" ")
        if word == "add":
            add(ledger, rows(*(10 * number + one for one in range(int(count)))))
        elif word == "note":
            ledger.append(Draft("noted", body={"step": number}), Draft("noted"))
        else:
            found = requests_of(ledger.events())
            left = [one for one in found.values() if not one.withdrawn]
            if left:
                withdraw(ledger, left[0].id, left[0])


def kinds(ledger: Ledger) -> list[tuple[str, str | None]]:
    return [(one.kind, one.request) for one in ledger.events()]


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_killed_at_any_write_it_is_as_before_a_step_or_after_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int
) -> None:
    """kill -9, by the process itself, at a write of a random history; and at every later one."""
    folder = tmp_path_factory.mktemp("killed")
    states = [[("created", None)]]
    for end in range(1, len(steps) + 1):
        whole = folder / f"whole-{end}.sqlite"
        live(whole, steps[:end], lambda _: None)
        states.append(kinds(Ledger(whole)))
    for count in range(seed % 5, 200, 5):
        path = folder / f"at-{count}.sqlite"
        ended = in_child(lambda path=path, count=count: live(path, steps, killed_at(count)))
        if path.exists() and path.stat().st_size:
            ledger = Ledger(path, create=True)
            assert ledger.faults() == []
            assert kinds(ledger) in states
            gone = {one.id for one in requests_of(ledger.events()).values() if one.withdrawn}
            assert not gone & set(ledger.texts())
            there = {one for one in requests_of(ledger.events()) if one not in gone}
            assert set(ledger.texts()) == there, "a text is there with its event, or neither is"
            Ledger(path).append(Draft("noted"))  # it goes on
        if os.waitstatus_to_exitcode(ended) == 0:
            break
    else:
        pytest.fail("the history never ended")


def test_killed_within_a_write_of_sqlite_it_is_as_before_or_after(tmp_path: Path) -> None:
    """The system kills the process when a file grows beyond a limit: in the middle of a commit."""
    path = tmp_path / "l.sqlite"
    add(Ledger(path, create=True), rows(1))
    size, outcomes = path.stat().st_size, set()

    def grow(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        add(Ledger(path), rows(*range(2, 40)))

    for limit in (600, 4000, 4700, 9000, size, size + 4096, size + 20_000, 10 * size):
        before = len(Ledger(path).events())
        if before > 2:
            break
        code = os.waitstatus_to_exitcode(in_child(lambda limit=limit: grow(limit)))
        outcomes.add(code)
        ledger = Ledger(path)
        assert ledger.faults() == []
        assert len(ledger.events()) in ((before,) if code else (before + 38,))
    assert outcomes == {0, -signal.SIGXFSZ}


# ---- what is gone


def test_a_withdrawn_text_is_in_no_file_and_the_chain_still_holds(
    ledger: Ledger, tmp_path: Path
) -> None:
    long = " ".join(f"Pladderoon's year {year}." for year in range(900))  # over several pages
    add(ledger, rows(1, text=long, question=None, answer=None, named=True))
    add(ledger, [*rows(2, question="Who?", answer="Nobodymuch", subject="Other", asker=None)])
    assert holds(tmp_path) == {"ledger.sqlite"}, "the search can see it"
    hashes = [one.hash for one in ledger.events()]
    erased = withdraw(ledger, "q-1", requests_of(ledger.events())["q-1"])
    assert holds(tmp_path) == set()
    assert erased.left == ()
    assert erased.looked_for > 50
    assert ledger.faults() == []
    assert [one.hash for one in ledger.events()][: len(hashes)] == hashes
    assert holds(tmp_path, ("Nobodymuch",)) == {"ledger.sqlite"}, "others keep theirs"
    assert "salt" not in str(ledger.texts().get("q-1", {}))


def test_the_search_is_not_blind_and_says_what_is_left(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With secure_delete off SQLite leaves the bytes, and erasing says so."""
    add(ledger, rows(1))
    careless = [one.replace("delete = ON", "delete = OFF") for one in database.SETTINGS]
    monkeypatch.setattr(database, "SETTINGS", tuple(careless))
    erased = withdraw(ledger, "q-1", requests_of(ledger.events())["q-1"])
    assert erased.left == (ledger.path,)


def test_texts_go_at_the_end_of_their_term(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, rows(1, keep_until="2026-03-05") + rows(2, keep_until="2026-03-06"))
    day = TODAY.replace(day=5)
    assert expire(ledger, day) == []
    erased = expire(ledger, day.replace(day=6))
    assert [one.request for one in erased] == ["q-1"]
    assert set(ledger.texts()) == {"q-2"}
    assert requests_of(ledger.events())["q-1"].erased == "erased"
    assert not holds(tmp_path, (f"{SENTINELS[1]} 1",))
    assert expire(ledger, day.replace(day=6)) == []
