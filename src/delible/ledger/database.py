"""SQLite as the ledger uses it: one form of file, one transaction per change, one message each.

``secure_delete`` overwrites what goes, and the rollback journal goes with each transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from delible.errors import RunError

#: Form of the file; one of a later form is refused.
SCHEMA = 1
#: Tells a ledger from other SQLite files ("dlbl").
APPLICATION = 0x646C626C
#: How long another process is waited for, in milliseconds.
PATIENCE = 5000
#: Of every connection. What goes is overwritten, and no other file keeps it.
SETTINGS = (
    "secure_delete = ON", "journal_mode = DELETE", "synchronous = EXTRA", "temp_store = MEMORY",
)  # fmt: skip

_TABLES = """
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, request TEXT, model TEXT,
    body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE);
CREATE TABLE texts (
    request TEXT NOT NULL, field TEXT NOT NULL, salt TEXT NOT NULL, content TEXT NOT NULL,
    PRIMARY KEY (request, field)) WITHOUT ROWID;
CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL,
    hash TEXT NOT NULL);
CREATE TRIGGER events_stay BEFORE UPDATE ON events
    BEGIN SELECT RAISE(ABORT, 'events of a ledger are never changed'); END;
CREATE TRIGGER events_last BEFORE DELETE ON events
    BEGIN SELECT RAISE(ABORT, 'events of a ledger are never deleted'); END;
"""
_WRONG = {
    "SQLITE_BUSY": (
        "another process is writing this ledger.", "Run the same command again when it has ended.",
    ),
    "SQLITE_FULL": (
        "the disk is full: the ledger is as it was before.",
        "Free some space and run the same command again.",
    ),
    "SQLITE_READONLY": ("it cannot be written.", "Choose a file that you may write to."),
    "SQLITE_CANTOPEN": ("it cannot be opened.", "Choose a place that you may write to."),
    "SQLITE_NOTADB": ("this is no ledger.", "Choose another --ledger FILE."),
    "SQLITE_CORRUPT": (
        "the file is damaged.", "Take a copy of it, or 'delible request import' an export.",
    ),
    "SQLITE_IOERR": (
        "the disk reports an error: the ledger is as it was before.",
        "Check the disk, and run the same command again.",
    ),
}  # fmt: skip


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection; what SQLite refuses is one clear message.

    Raises:
        RunError: The file cannot be used; says what to do.
    """
    try:
        with closing(
            sqlite3.connect(path, timeout=PATIENCE / 1000, isolation_level=None)
        ) as connection:
            for setting in (*SETTINGS, f"busy_timeout = {PATIENCE}"):
                connection.execute(f"PRAGMA {setting}").fetchall()
            yield connection
    except sqlite3.Error as error:
        raise explained(error, path) from error


@contextmanager
def writing(path: Path, before: Callable[[str], None]) -> Iterator[sqlite3.Connection]:
    """A transaction, whole or not at all; others wait until it is over.

    Args:
        before: Called before and after the end of it, for tests that die there.
    """
    with connected(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            before("commit")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        before("committed")


def make_tables(connection: sqlite3.Connection) -> None:
    """The tables of an empty file."""
    for statement in _statements(_TABLES):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Whether a file is a ledger that this delible knows.

    Raises:
        RunError: It is not.
    """
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise RunError("this is no ledger.", where=str(path), hint="Choose another --ledger FILE.")
    if version > SCHEMA:
        raise RunError(
            f"it has the form {version}, this delible knows {SCHEMA}.",
            where=str(path),
            hint="A newer delible wrote it: update yours.",
        )


def explained(error: sqlite3.Error, path: Path) -> RunError:
    """What SQLite refuses, in one message."""
    name = str(getattr(error, "sqlite_errorname", ""))
    for known, (problem, hint) in _WRONG.items():
        if name == known or name.startswith(f"{known}_"):
            return RunError(problem, where=str(path), hint=hint)
    return RunError(f"{error}.", where=str(path), hint="Nothing was changed.")


def _statements(script: str) -> Iterator[str]:
    """SQL statements; those of triggers hold semicolons."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
