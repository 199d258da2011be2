"""A scan says "nothing found" only if it would have found something; it finds each known trap."""

from __future__ import annotations

import random
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_by_hand import Letters

from delible.errors import RunError
from delible.memory import Item, Memory, database, place, store
from delible.memory import scan as scan_module
from delible.memory.pieces import Sentinel, sentinels
from delible.memory.scan import CHUNK, occurrences

SECRET = "Ada Brook keeps a hippopotamus in the cellar of the lighthouse"


def filled(folder: Path) -> Memory:
    memory = Memory(folder, Letters())
    memory.add([Item(id=f"i{n}", text=f"Somebody number {n} likes tea") for n in range(60)])
    memory.add([
        Item(id="the-secret-id", text=SECRET, source="user ada@example.com",
             data={"plan": 'she said "come at nine o\'clock, please"'}),
        Item(id="kid", text="A large animal lives below ground", parents=("the-secret-id",)),
    ])  # fmt: skip
    return memory


def test_a_deletion_leaves_no_byte(tmp_path: Path) -> None:
    memory = filled(tmp_path / "m")
    deletion = memory.forget(ids=["the-secret-id"])
    certificate = memory.certificate(deletion)
    assert certificate.verdict == "nothing found"
    assert certificate.control
    own = {kind: count for kind, count in certificate.pieces.items() if kind != "otherwise"}
    assert own == {"id": 1, "text": 11, "vector": 2, "word": 2}
    assert certificate.seen_before == sum(own.values())
    assert set(certificate.files) == {"key", "lock", "memory.db", "vectors.f32"}
    assert [one["kind"] for one in deletion.record["removed"]] == ["entry", "entry"]
    whole = b"".join(path.read_bytes() for path in sorted((tmp_path / "m").iterdir()))
    for gone in (SECRET, "ada@example.com", "o'clock", "large animal", "the-secret-id", "hippopot"):
        assert gone.encode() not in whole, gone
    assert "hippopotamus" not in certificate.model_dump_json()
    assert "the-secret-id" not in certificate.model_dump_json()


def secure_delete_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(path: Path) -> sqlite3.Connection:
        opened = before(path)
        opened.execute("PRAGMA secure_delete = OFF")
        return opened

    before = place.connect
    monkeypatch.setattr(place, "connect", connect)


def index_not_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.Tables, "optimise", lambda _: None)


def log_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write-ahead log that somebody's open connection keeps alive."""

    def connect(path: Path) -> sqlite3.Connection:
        while len(held) > 0:
            held.pop().close()
        opened = before(path)
        opened.execute("PRAGMA journal_mode = WAL")
        held.append(sqlite3.connect(path))
        held[-1].execute("SELECT 1 FROM sqlite_master").fetchone()
        return opened

    held: list[sqlite3.Connection] = []
    before = place.connect
    monkeypatch.setattr(place, "connect", connect)


def rows_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    from delible.memory.vectors import Vectors

    before = Vectors.shorten

    def shorten(self: Vectors, rows: int) -> None:
        tail = self.path.read_bytes()[rows * self.row_bytes :]
        before(self, rows)
        (self.path.parent / "old").write_bytes(tail)

    monkeypatch.setattr(Vectors, "shorten", shorten)


@pytest.mark.parametrize(
    ("trap", "where"),
    [
        (secure_delete_off, "memory.db"), (index_not_optimised, "memory.db"),
        (log_left, "memory.db"), (rows_not_moved, "old"),
    ],
)  # fmt: skip
def test_each_known_trap_is_found(
    trap: Callable[[pytest.MonkeyPatch], None], where: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memory = filled(tmp_path)
    trap(monkeypatch)
    monkeypatch.setattr(store, "cleared", scan_module.scan)  # what is found is mended otherwise
    certificate = memory.certificate(memory.forget(ids=["the-secret-id"]))
    assert certificate.verdict == "remains found"
    assert where in {name for name, _ in certificate.remains}


def test_a_log_of_others_is_ended_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = filled(tmp_path)
    monkeypatch.setattr(database, "PATIENCE", 0.01)
    other = sqlite3.connect(tmp_path / "memory.db")
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("SELECT 1 FROM sqlite_master").fetchone()
    with pytest.raises(RunError, match="another program"):
        len(memory)
    other.close()
    assert len(memory) == 62
    assert not list(tmp_path.glob("*-wal"))


def test_a_copy_in_the_folder_is_found(tmp_path: Path) -> None:
    memory = filled(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "backup.txt").write_text(f"x{SECRET}", encoding="utf-8")
    certificate = memory.certificate(memory.forget(ids=["the-secret-id"]))
    assert certificate.verdict == "remains found"
    assert ("notes/backup.txt", 1) in certificate.remains


def test_a_scan_that_finds_nothing_at_all_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = filled(tmp_path)
    monkeypatch.setattr(scan_module, "occurrences", lambda *_: iter(()))
    certificate = memory.certificate(memory.forget(ids=["the-secret-id"]))
    assert (certificate.verdict, certificate.control) == ("not shown", False)
    assert memory.certify(["anything at all"]).verdict == "not shown"
    quick = memory.certificate(memory.forget(ids=["i1"], scanned=False))
    assert (quick.verdict, quick.files) == ("not shown", {})


def test_pieces_that_were_never_seen_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = filled(tmp_path)
    wrong = Sentinel("text", b"written in another way")
    from delible.memory import store

    monkeypatch.setattr(store, "sentinels", lambda _: [wrong])
    deletion = memory.forget(ids=["the-secret-id"])
    assert any("1 of" in one for one in memory.certificate(deletion).not_computed)
    assert memory.certificate(deletion).verdict == "not shown"


def test_what_stays_and_says_the_same_is_no_remains(tmp_path: Path) -> None:
    memory = filled(tmp_path)
    memory.add([Item(id="other", text=f"Long before, it is said that {SECRET} and more")])
    certificate = memory.certificate(memory.forget(ids=["the-secret-id"]))
    assert certificate.verdict == "nothing found"
    assert certificate.shared >= 2
    memory.forget(ids=["i3"], descendants="quarantine")
    kept = memory.certificate(memory.forget(ids=["other"]))
    assert kept.shared == 0


def test_a_memory_is_certified_as_it_is(tmp_path: Path) -> None:
    memory = filled(tmp_path)
    memory.forget(ids=["the-secret-id"])
    good = memory.certify([SECRET])
    assert good.verdict == "nothing found"
    assert good.counted == good.state == memory.state
    assert good.deletion == {"deletions": 1, "removed_by_kind": {"entry": 2}}
    told = memory.certify(["Somebody number 7 likes tea"])
    assert (told.verdict, told.held, told.shared > 0) == ("remains found", 1, True)
    with sqlite3.connect(tmp_path / "memory.db") as by_hand:
        by_hand.execute("UPDATE items SET text = ? WHERE id = 'i7'", (SECRET,))
    by_hand.close()
    bad = memory.certify()
    assert bad.verdict == "remains found"
    assert bad.counted != bad.state


def test_an_item_that_came_back_by_hand_is_told(tmp_path: Path) -> None:
    memory = filled(tmp_path)
    memory.forget(ids=["the-secret-id"])
    with sqlite3.connect(tmp_path / "memory.db") as by_hand:
        form = by_hand.execute("SELECT alike FROM tombstones").fetchone()[0]
        by_hand.execute("UPDATE items SET text_form = ? WHERE id = 'i7'", (form,))
    by_hand.close()
    assert memory.certify().returned == 1
    assert memory.certify().verdict == "remains found"


@pytest.mark.parametrize("at", [0, 5, CHUNK - 4, CHUNK - 1, CHUNK, 2 * CHUNK + 11])
def test_a_piece_is_found_wherever_it_stands(at: int) -> None:
    piece = b"\x00\xffneedle\xfe"
    content = bytearray(2 * CHUNK + 40)
    content[at : at + len(piece)] = piece
    pieces = [b"hidden in hay", piece, b"\x00\xffneedla", piece[:7]]
    assert set(occurrences(bytes(content), pieces)) == {(piece, at), (piece[:7], at)}
    assert list(occurrences(b"short", pieces)) == []
    assert set(occurrences(piece, pieces)) == {(piece, 0), (piece[:7], 0)}


def test_pieces_are_of_everything_that_is_said() -> None:
    item = Item(id="an-id-of-mine", text="first words and some more words and the last words",
                key="by this key", source="a source", subject="a subject",
                data={"deep": [{"er": "inner text"}], "n": 3})  # fmt: skip
    pieces: set[Any] = {(one.kind, one.piece) for one in sentinels([item])}
    for kind, piece in (
        ("text", b"first words and some mor"), ("text", b"words and the last words"),
        ("text", b"by this key"), ("text", b"a source"), ("text", b"a subject"),
        ("text", b"inner text"), ("id", b"an-id-of-mine"),
    ):  # fmt: skip
        assert (kind, piece) in pieces
    assert all(len(piece) >= 6 for _, piece in pieces)


def test_what_sqlite_leaves_where_it_moves_rows_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With these ids and this key a page keeps pieces of a deleted row that was moved before."""
    draw = random.Random(19)
    monkeypatch.setattr(secrets, "token_bytes", lambda count=32: bytes(range(count)))
    ids = [f"{draw.getrandbits(128):032x}" for _ in range(300)]
    memory = Memory(tmp_path)
    for first in range(0, 300, 10):
        memory.add([Item(id=one, text=f"note {one}") for one in ids[first : first + 10]])
    gone = [one for one in ids if draw.random() < 0.3]
    deletion = memory.forget(ids=gone)
    assert memory.certificate(deletion).verdict == "nothing found"
    raw = (tmp_path / "memory.db").read_bytes()
    assert not any(one[8:32].encode() in raw or one[:24].encode() in raw for one in gone)
    assert {one.id for one in memory.items()} == set(ids) - set(gone)
    assert memory.certify().verdict != "remains found"
