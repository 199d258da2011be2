"""The tables of a memory, in SQLite, and what they are asked.

Deleted rows are overwritten at once (``secure_delete``), changes go through a rollback journal that
is gone after each of them, and what SQLite would spill stays in memory (``temp_store``). Words are
indexed by FTS5 without their text; its index still holds a deleted word until it is optimised, so
every deletion does that.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from delible.errors import RunError
from delible.memory import steps
from delible.memory.items import Item, State, near

FORMAT = "1"
#: The file.
DATABASE = "memory.db"
#: How long one waits for another's change, in seconds.
PATIENCE = 120.0
#: Changes are on the disk before anybody is told of them.
SYNCHRONOUS = "FULL"
#: Sums of hashes of items are taken modulo this.
MODULUS = 1 << 256

SCHEMA = """
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items(
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, key TEXT NOT NULL,
  text TEXT NOT NULL, subject TEXT NOT NULL, source TEXT NOT NULL, data TEXT NOT NULL,
  state TEXT NOT NULL, slot INTEGER UNIQUE, key_form BLOB NOT NULL, text_form BLOB NOT NULL);
CREATE INDEX items_by_kind ON items(kind, slot);
CREATE INDEX items_by_key ON items(key_form);
CREATE INDEX items_by_text ON items(text_form);
CREATE TABLE derived(child INTEGER NOT NULL, parent INTEGER NOT NULL, PRIMARY KEY(child, parent))
  WITHOUT ROWID;
CREATE INDEX derived_by_parent ON derived(parent);
CREATE TABLE tombstones(alike BLOB NOT NULL, same BLOB NOT NULL, PRIMARY KEY(alike, same))
  WITHOUT ROWID;
CREATE TABLE learned(name TEXT PRIMARY KEY, file TEXT NOT NULL, stale INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE learned_from(seq INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY(seq, name))
  WITHOUT ROWID;
CREATE TABLE intents(number INTEGER PRIMARY KEY, plan TEXT NOT NULL);
CREATE TABLE intended(slot INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE deletions(number INTEGER PRIMARY KEY, record TEXT NOT NULL);
"""
WORDS = "CREATE VIRTUAL TABLE words USING fts5(key, content='', tokenize='unicode61')"
COLUMNS = "id, kind, key, text, subject, source, data"


def connect(path: Path) -> sqlite3.Connection:
    """A connection that leaves nothing behind; transactions are begun by hand."""
    database = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        database.execute("PRAGMA secure_delete = ON")
        database.execute("PRAGMA temp_store = MEMORY")
        database.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
        mode = database.execute("PRAGMA journal_mode").fetchone()[0]
        if mode != "delete":  # a write-ahead log would keep what was deleted
            database.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.OperationalError as error:
        database.close()
        locked = "another program has it open, with a log that would keep what is deleted"
        raise RunError(
            f"{locked if 'locked' in str(error) else 'cannot be used'} ({error}).",
            where=str(path),
            hint="Close what else uses it and run the same command again.",
        ) from error
    except sqlite3.DatabaseError as error:
        database.close()
        raise RunError(
            f"is no memory ({error}).", where=str(path), hint="Name the folder of a memory."
        ) from error
    return database


def make(database: sqlite3.Connection) -> None:
    """Makes the tables, all or none of them, unless they are there."""
    database.execute("BEGIN EXCLUSIVE")
    if has_tables(database):
        database.execute("ROLLBACK")
        return
    steps.reached("database: make the tables")
    for statement in SCHEMA.split(";\n"):
        if statement.strip():
            database.execute(statement)
    if has_fts5(database):
        database.execute(WORDS)
    database.execute("INSERT INTO settings VALUES('format', ?)", (FORMAT,))
    steps.reached("database: commit the tables")
    database.execute("COMMIT")


def has_tables(database: sqlite3.Connection) -> bool:
    """Whether this is a memory."""
    try:
        found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'intended'").fetchone()
    except sqlite3.DatabaseError:  # not a database at all
        return False
    return found is not None


def has_fts5(database: sqlite3.Connection) -> bool:
    """Whether this Python's SQLite indexes words."""
    return any(name == "ENABLE_FTS5" for (name,) in database.execute("PRAGMA compile_options"))


@contextmanager
def snapshot(database: sqlite3.Connection) -> Iterator[None]:
    """Reading, without anybody who changes what is read."""
    database.execute("BEGIN")
    try:
        database.execute("SELECT 1 FROM settings").fetchone()  # from here on
        yield
    finally:
        database.execute("ROLLBACK")


@contextmanager
def exclusive(database: sqlite3.Connection) -> Iterator[None]:
    """Changing, all or nothing, without anybody who reads.

    Raises:
        RunError: Somebody read for too long.
    """
    try:
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        raise RunError(
            f"the memory is in use ({error}).", hint="Run the same command again."
        ) from error
    try:
        yield
        steps.reached("database: commit")
        database.execute("COMMIT")
        steps.reached("database: committed")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


class Tables:
    """What the tables hold, read and changed within the transaction of a connection.

    Args:
        database: Of :func:`connect`.
        secret: The key of all hashes.
    """

    def __init__(self, database: sqlite3.Connection, secret: bytes) -> None:
        self.database, self.secret = database, secret
        tables = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'")
        self.indexed = tables.fetchone() is not None

    # ---- settings

    def setting(self, name: str, default: str = "") -> str:
        row = self.database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def set(self, name: str, value: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO settings VALUES(?, ?)", (name, value))

    @property
    def width(self) -> int:
        """Numbers in a vector; 0 before the first."""
        return int(self.setting("width", "0"))

    @property
    def rows(self) -> int:
        """How many vectors there are."""
        last = self.database.execute("SELECT max(slot) FROM items").fetchone()[0]
        return 0 if last is None else int(last) + 1  # slots have no holes

    @property
    def name(self) -> str:
        """Tells this memory from others."""
        return self.hashed("this memory").hex()[:16]

    def pending(self) -> bool:
        """Whether a deletion was begun and not ended."""
        return self.database.execute("SELECT 1 FROM intents").fetchone() is not None

    def hashed(self, text: str) -> bytes:
        """A keyed hash: whoever lacks the key cannot try texts out."""
        return hmac.digest(self.secret, text.encode(), "sha256")

    def alike(self, text: str) -> bytes:
        """Of the near form of a text."""
        return self.hashed(f"near {near(text)}")

    def same(self, text: str) -> bytes:
        """Of the text itself, without the space around it."""
        return self.hashed(f"same {text.strip()}")

    # ---- items

    def items(self, seqs: Sequence[int]) -> dict[int, Item]:
        """Items by their place, in order of their places."""
        asked = json.dumps(list(seqs))
        chosen = "seq IN (SELECT value FROM json_each(?))"
        parents: dict[int, list[str]] = {}
        for child, parent in self.database.execute(
            "SELECT child, id FROM derived JOIN items ON seq = parent WHERE child IN "
            "(SELECT value FROM json_each(?))",
            (asked,),
        ):
            parents.setdefault(child, []).append(parent)
        query = f"SELECT seq, {COLUMNS} FROM items WHERE {chosen} ORDER BY seq"
        return {
            row[0]: _item(row[1:], parents.get(row[0], ()))
            for row in self.database.execute(query, (asked,))
        }

    def places(self, ids: Iterable[str], *, active: bool = True) -> dict[str, int]:
        """Places of items by id; what is not there is left out."""
        asked = "id IN (SELECT value FROM json_each(?))"
        query = f"SELECT id, seq FROM items WHERE {asked}" + " AND state = 'active'" * active
        return dict(self.database.execute(query, (json.dumps(list(ids)),)))

    def listed(
        self, kind: str | None = None, subject: str | None = None, state: State = "active"
    ) -> list[int]:
        """Places of items in the order in which they came."""
        wanted, values = ["state = ?"], [str(state)]
        for column, value in (("kind", kind), ("subject", subject)):
            if value is not None:
                wanted.append(f"{column} = ?")
                values.append(value)
        query = f"SELECT seq FROM items WHERE {' AND '.join(wanted)} ORDER BY seq"
        return [seq for (seq,) in self.database.execute(query, values)]

    def active(self) -> int:
        """How many items are active."""
        query = "SELECT count(*) FROM items WHERE state = 'active'"
        return int(self.database.execute(query).fetchone()[0])

    def texts(self) -> Iterator[tuple[int, str, str, str, str, str]]:
        """Place, key, text, subject, data and source of every item, whatever its state."""
        yield from self.database.execute(
            "SELECT seq, key, text, subject, data, source FROM items ORDER BY seq"
        )

    def insert(self, item: Item, slot: int | None, parents: Iterable[int]) -> int:
        """Puts an active item behind all others; its place."""
        self.database.execute(
            f"INSERT INTO items({COLUMNS}, state, slot, key_form, text_form) "
            "VALUES(?, ?, ?, ?, ?, ?, ?, 'active', ?, ?, ?)",
            (*_row(item), slot, self.alike(item.found_by), self.alike(item.text)),
        )
        seq = int(self.database.execute("SELECT last_insert_rowid()").fetchone()[0])
        self.database.executemany(
            "INSERT INTO derived VALUES(?, ?)", [(seq, parent) for parent in parents]
        )
        self.index(seq, item.found_by)
        return seq

    def release(self, seq: int, item: Item, slot: int | None, vector: bytes) -> None:
        """Makes a quarantined item active."""
        self.database.execute(
            "UPDATE items SET state = 'active', slot = ? WHERE seq = ?", (slot, seq)
        )
        self.index(seq, item.found_by)
        self.shift(self.weight(item, "active", vector) - self.weight(item, "quarantined", b""))

    def returned(self) -> int:
        """Items that say what was deleted."""
        query = "SELECT alike FROM tombstones"
        return int(self.database.execute(
            f"SELECT count(*) FROM items WHERE key_form IN ({query}) OR text_form IN ({query})"
        ).fetchone()[0])  # fmt: skip

    def change(self, seq: int, item: Item) -> None:
        """Gives a place another item, without its words."""
        columns = ", ".join(f"{name.strip()} = ?" for name in COLUMNS.split(","))
        self.database.execute(
            f"UPDATE items SET {columns}, key_form = ?, text_form = ? WHERE seq = ?",
            (*_row(item), self.alike(item.found_by), self.alike(item.text), seq),
        )

    # ---- words

    def index(self, seq: int, key: str) -> None:
        if self.indexed:
            self.database.execute("INSERT INTO words(rowid, key) VALUES(?, ?)", (seq, key))

    def unindex(self, seq: int, key: str) -> None:
        if self.indexed:
            self.database.execute(
                "INSERT INTO words(words, rowid, key) VALUES('delete', ?, ?)", (seq, key)
            )

    def optimise(self) -> None:
        """Rewrites the index of words: before that, deleted words are still in it."""
        if self.indexed:
            self.database.execute("INSERT INTO words(words) VALUES('optimize')")

    def matching(self, query: str, count: int, kind: str | None) -> list[tuple[int, float]]:
        """Places and BM25 (k1 = 1.2, b = 0.75) of the keys that share a word with a query."""
        if not self.indexed:
            raise RunError(
                "words cannot be searched: this Python's SQLite is built without FTS5.",
                hint="Search by meaning instead, or use another build of Python.",
            )
        words = list(dict.fromkeys(re.findall(r"\w+", near(query))))
        if not words:
            return []
        chosen = "" if kind is None else " AND kind = ?"
        found = self.database.execute(
            "SELECT seq, bm25(words) FROM words JOIN items ON seq = words.rowid "
            f"WHERE words MATCH ?{chosen} ORDER BY bm25(words), seq LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), *([kind] if kind else []), count),
        )
        return [(seq, -score) for seq, score in found]

    # ---- the state

    def weight(self, item: Item, state: State, vector: bytes) -> int:
        """What an item adds to the state: a hash of all that it is."""
        told = hashlib.sha256(f"{state} {item.canonical()} ".encode())
        told.update(vector)
        return int.from_bytes(told.digest(), "big")

    def shift(self, by: int) -> None:
        """Adds to the state, which is the sum over all items: no order, no history."""
        self.set("state", f"{(int(self.state, 16) + by) % MODULUS:064x}")

    @property
    def state(self) -> str:
        return self.setting("state", f"{0:064x}")


def _row(item: Item) -> tuple[str, ...]:
    data = json.dumps(item.data, sort_keys=True, ensure_ascii=False)
    return (item.id, item.kind, item.key, item.text, item.subject, item.source, data)


def _item(row: Sequence[str], parents: Iterable[str]) -> Item:
    id_, kind, key, text, subject, source, data = row
    return Item.model_construct(
        text=text, id=id_, kind=kind, key=key, subject=subject, source=source,
        data=json.loads(data), parents=tuple(sorted(parents)),
    )  # fmt: skip


__all__ = [
    "MODULUS", "Tables", "connect", "exclusive", "has_fts5", "has_tables", "make", "snapshot",
]  # fmt: skip
