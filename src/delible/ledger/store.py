"""The file of the ledger: SQLite, events that are only added, and texts that can go.

Every change is one transaction: whoever is killed, or finds the disk full, leaves the ledger as it
was.
Next to the file lies a key (``NAME.key``) for keyed hashes, which are never undone without it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from delible.errors import RunError
from delible.files import explain_disk
from delible.ledger.chain import Event, canonical, event_hash, faults, following
from delible.ledger.database import SCHEMA, check, connected, make_tables, writing
from delible.ledger.texts import ERASING, PrivateText, commitment, text_faults


@dataclass(frozen=True)
class Draft:
    """An event that is to be written, and the private texts that come with it.

    Attributes:
        texts: By field (``records.0``, ``subjects.0``, ``asker``); their hashes go into the body.
        erase: The texts of its request go.
    """

    kind: str
    request: str | None = None
    model: str | None = None
    body: Mapping[str, Any] | None = None
    texts: Mapping[str, str] | None = None
    erase: bool = False


def default_place() -> Path:
    """``DELIBLE_LEDGER``, or the ledger in the user's data folder."""
    if chosen := os.environ.get("DELIBLE_LEDGER"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("delible")) / "ledger.sqlite"


def now() -> str:
    """The time by the clock of this machine, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _nothing(what: str) -> None:
    """Stands where tests let a process die."""


class Ledger:
    """A ledger on disk.

    Args:
        path: Its file.
        clock: Says the time that events are given; nothing depends on it but what is shown.
        create: Make it if it is not there.
        before: Called before every write with a word for it.

    Raises:
        RunError: It is not there, is no ledger, or cannot be used; says what to do.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], str] = now,
        create: bool = False,
        before: Callable[[str], None] = _nothing,
    ) -> None:
        self.path = Path(path).expanduser()
        self.clock, self.before = clock, before
        if not self.path.exists() and not create:
            raise RunError(
                "there is no ledger.",
                where=str(self.path),
                hint="'delible request add' makes one; --ledger FILE names another.",
            )
        if create and self._is_new():
            self._make(self._first)
        with connected(self.path) as connection:
            check(connection, self.path)

    @classmethod
    def from_events(
        cls,
        path: Path,
        events: Sequence[Event],
        texts: Mapping[str, Mapping[str, PrivateText]],
        **options: Any,
    ) -> Ledger:
        """A new ledger with the events of an export. Its key comes by another way, if at all."""
        made = cls.__new__(cls)
        made.path = path.expanduser()
        made.clock, made.before = options.get("clock", now), options.get("before", _nothing)
        made._make(lambda connection: made._fill(connection, events, texts))
        return cls(path, **options)

    # ---- reading

    @property
    def key_path(self) -> Path:
        """Where the key of keyed hashes lies."""
        return self.path.with_name(f"{self.path.name}.key")

    @property
    def runs(self) -> Path:
        """Where runs of requests lie, unless another place is named."""
        return self.path.with_name(f"{self.path.stem}-runs")

    @property
    def id(self) -> str:
        """Of this ledger, the same in all its exports."""
        return str(self.events()[0].body["ledger"])

    def events(self) -> list[Event]:
        """All events, in order."""
        with connected(self.path) as connection:
            return self._read(connection)

    def texts(self, request: str | None = None) -> dict[str, dict[str, PrivateText]]:
        """Private texts that are still there, by request and field; of all requests or of one."""
        found: dict[str, dict[str, PrivateText]] = {}
        query = "SELECT request, field, salt, content FROM texts ORDER BY request, field"
        with connected(self.path) as connection:
            for owner, field, salt, content in connection.execute(query):
                if request in (None, owner):
                    found.setdefault(owner, {})[field] = PrivateText(salt, content)
        return found

    def faults(self) -> list[str]:
        """What is wrong with the file's content, in sentences; empty: it is as it was written."""
        with connected(self.path) as connection:
            broken = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
            head = connection.execute("SELECT size, hash FROM head").fetchone()
        if broken != ["ok"]:
            return [f"the file is damaged ({broken[0]})"]
        try:
            events = self.events()
        except RunError as error:
            return [error.problem.rstrip(".")]
        found = faults(events)
        last = events[-1].hash if events else None
        if head is None or (head[0], head[1]) != (len(events), last):
            stands = "nothing" if head is None else f"{head[0]} events"
            found.append(
                f"there are {len(events)} events, and the head stands for {stands} with another "
                "last one: events are missing at the end, or were added"
            )
        return found + text_faults(events, self.texts())

    # ---- writing

    def append(self, *drafts: Draft) -> list[Event]:
        """Writes events, all of them or none.

        Raises:
            RunError: The ledger was changed by hand, is being written by another process for long,
                or the disk refuses it.
        """
        return self.append_if(lambda events: drafts)

    def append_if(self, look: Callable[[list[Event]], Sequence[Draft]]) -> list[Event]:
        """Writes what a look at the events asks for; nobody else writes in between."""
        with writing(self.path, self.before) as connection:
            events = self._read(connection)
            last, written = self._last(connection, events), []
            for draft in look(events):
                last = self._add(connection, last, draft)
                written.append(last)
            self._head(connection, last)
        return written

    def take_over(
        self, events: Sequence[Event], texts: Mapping[str, Mapping[str, PrivateText]]
    ) -> int:
        """Adds the events of an export, which must go on from those that are here, and its texts.

        Returns:
            How many were added.

        Raises:
            RunError: They do not.
        """
        with writing(self.path, self.before) as connection:
            here = self._read(connection)
            self._last(connection, here)
            shared = min(len(here), len(events))
            if [one.hash for one in events[:shared]] != [one.hash for one in here[:shared]]:
                raise RunError(
                    "the export does not go on from this ledger.",
                    where=str(self.path),
                    hint="Import it into a file of its own: --ledger NEW.",
                )
            if len(events) >= len(here):
                self._fill(connection, events, texts, known=len(here))
        return max(0, len(events) - len(here))

    def keyed(self, kind: str, text: str) -> str:
        """A hash that nobody can make, or try texts against, without the key (hexadecimal).

        Raises:
            RunError: The key is missing, or is another ledger's.
        """
        return hmac.new(self._key(), f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()

    # ---- parts

    def _is_new(self) -> bool:
        return not self.path.exists() or self.path.stat().st_size == 0

    def _make(self, fill: Callable[[sqlite3.Connection], None]) -> None:
        with explain_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)
        with writing(self.path, self.before) as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return  # another process was faster
            self.before("tables")
            make_tables(connection)
            fill(connection)

    def _first(self, connection: sqlite3.Connection) -> None:
        """The first event; the key before it, for a ledger without one would be of no use."""
        if not self.key_path.exists():
            self.before("key")
            with explain_disk(self.key_path):
                write_secret(self.key_path, f"{secrets.token_hex(32)}\n".encode())
        body = {"ledger": secrets.token_hex(16), "version": SCHEMA, "key": self._key_id()}
        self._head(connection, self._add(connection, None, Draft("created", body=body)))

    def _key(self) -> bytes:
        hint = f"Put the file back from a copy: {self.key_path}."
        try:
            key = bytes.fromhex(self.key_path.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            raise RunError("its key is missing.", where=str(self.path), hint=hint) from None
        known = self.events()[0].body.get("key") if not self._is_new() else None
        if known not in (None, hashlib.sha256(key).hexdigest()[:16]):
            raise RunError("its key is another ledger's.", where=str(self.path), hint=hint)
        return key

    def _key_id(self) -> str:
        key = bytes.fromhex(self.key_path.read_text(encoding="ascii").strip())
        return hashlib.sha256(key).hexdigest()[:16]

    def _read(self, connection: sqlite3.Connection) -> list[Event]:
        columns = "sequence, time, kind, request, model, body, previous, hash"
        rows = connection.execute(f"SELECT {columns} FROM events ORDER BY sequence")
        try:
            return [_event(row) for row in rows]
        except (TypeError, ValueError):
            raise RunError(
                "an event's content is no JSON, or of another kind: it was changed.",
                where=str(self.path),
                hint="Put the file back from a copy, or 'delible request import' an export.",
            ) from None

    def _last(self, connection: sqlite3.Connection, events: Sequence[Event]) -> Event:
        """The last event, if the file still ends as it was left.

        Raises:
            RunError: It does not.
        """
        head = connection.execute("SELECT size, hash FROM head").fetchone()
        last = events[-1] if events else None
        if last is None or head != (len(events), last.hash) or (
            event_hash(last.content()) != last.hash
        ):  # fmt: skip
            raise RunError(
                "it was changed by something else than delible.",
                where=str(self.path),
                hint=f"See: delible verify {self.path}",
            )
        return last

    def _add(self, connection: sqlite3.Connection, last: Event | None, draft: Draft) -> Event:
        body = dict(draft.body or {})
        texts = {
            field: PrivateText(secrets.token_hex(16), content)
            for field, content in (draft.texts or {}).items()
        }
        if texts:
            body["texts"] = {
                field: commitment(one.salt, one.content) for field, one in texts.items()
            }
        event = following(last, self.clock(), draft.kind, draft.request, draft.model, body)
        self._insert(connection, event)
        for field, text in texts.items():
            self._keep(connection, str(draft.request), field, text)
        if draft.erase:
            self.before("erase")
            connection.execute("DELETE FROM texts WHERE request = ?", (draft.request,))
        return event

    def _insert(self, connection: sqlite3.Connection, event: Event) -> None:
        self.before("event")
        connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                event.sequence, event.time, event.kind, event.request, event.model,
                canonical(event.body).decode(), event.previous, event.hash,
            ),
        )  # fmt: skip

    def _fill(
        self,
        connection: sqlite3.Connection,
        events: Sequence[Event],
        texts: Mapping[str, Mapping[str, PrivateText]],
        known: int = 0,
    ) -> None:
        for event in events[known:]:
            self._insert(connection, event)
            if event.kind in ERASING:
                connection.execute("DELETE FROM texts WHERE request = ?", (event.request,))
        for request, fields in texts.items():
            for field, text in fields.items():
                self._keep(connection, request, field, text)
        self._head(connection, events[-1])

    def _keep(
        self, connection: sqlite3.Connection, request: str, field: str, text: PrivateText
    ) -> None:
        self.before("text")
        connection.execute(
            "INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)",
            (request, field, text.salt, text.content),
        )

    def _head(self, connection: sqlite3.Connection, last: Event) -> None:
        self.before("head")
        connection.execute(
            "INSERT OR REPLACE INTO head VALUES (1, ?, ?)", (last.sequence, last.hash)
        )


def write_secret(path: Path, content: bytes) -> None:
    """Writes a file that only its owner may read, whole or not at all; one that is there stays.

    Raises:
        FileExistsError: There is one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.link(temporary, path)  # unlike a rename, this never takes another's place
    finally:
        temporary.unlink(missing_ok=True)


def _event(row: Sequence[Any]) -> Event:
    sequence, time, kind, request, model, body, previous, digest = row
    return Event(sequence, time, kind, request, model, json.loads(body), previous, digest)
