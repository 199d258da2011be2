"""Where a memory lies, and how it is read and written: one writer, readers before or after it."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock

from delible.errors import RunError
from delible.files import atomic_file, explain_disk
from delible.memory import forgetting
from delible.memory.database import (
    DATABASE,
    FORMAT,
    Tables,
    connect,
    exclusive,
    has_tables,
    make,
    snapshot,
)
from delible.memory.items import near
from delible.memory.vectors import VECTORS, Vectors

KEY, LOCK = "key", "lock"


class Place:
    """The folder of a memory.

    Args:
        folder: Where it is, or will be.
        make_new: Make the folder if there is no memory in it.

    Raises:
        RunError: The folder holds no memory, or one of another version, or its key is gone.
    """

    def __init__(self, folder: Path, *, make_new: bool = True) -> None:
        self.folder = folder
        self._vectors = Vectors(folder / VECTORS, 0)
        if not self._is_there():
            self._make(make_new)
        with explain_disk(folder / KEY):
            self._secret = (folder / KEY).read_bytes()
        with self.reading() as tables:
            if tables.setting("format") != FORMAT:
                raise RunError("is a memory of another version.", where=str(folder))

    def vectors(self, tables: Tables) -> Vectors:
        """The file of vectors."""
        if self._vectors.width != (width := tables.width):
            self._vectors = Vectors(self.folder / VECTORS, width)
        return self._vectors

    def hashed(self, text: str) -> str:
        """A hash with this memory's key, alike for case and spaces (hexadecimal).

        By it a text is told again without being kept; whoever lacks the key cannot try texts out.
        """
        return hmac.digest(self._secret, f"told {near(text)}".encode(), "sha256").hex()

    @contextmanager
    def reading(self) -> Iterator[Tables]:
        """The memory at one moment: while it is read, nobody changes it."""
        while True:
            with closing(connect(self.folder / DATABASE)) as database:
                tables = Tables(database, self._secret)
                with snapshot(database):
                    if self._whole(tables):
                        yield tables
                        return
            with self.writing():  # somebody is at it, or was killed: then this mends it
                pass

    @contextmanager
    def writing(self) -> Iterator[Tables]:
        """The only writer, after what a killed one left is carried out or taken back."""
        with (
            FileLock(self.folder / LOCK, mode=0o600),
            closing(connect(self.folder / DATABASE)) as database,
        ):
            tables = Tables(database, self._secret)
            if not self._whole(tables):
                with exclusive(database):
                    if tables.pending():
                        forgetting.carry_out(tables, self.vectors(tables))
                    else:
                        self.vectors(tables).shorten(tables.rows)
                if not self._whole(tables):
                    raise RunError("cannot be mended.", where=str(self.folder))
            yield tables

    def _whole(self, tables: Tables) -> bool:
        return not tables.pending() and self.vectors(tables).fits(tables.rows)

    def _is_there(self) -> bool:
        """Whether the key and the tables were made, to their end."""
        path = self.folder / DATABASE
        if not (self.folder / KEY).exists() or not path.exists():
            return False
        with closing(connect(path)) as database:
            return has_tables(database)

    def _make(self, make_new: bool) -> None:
        path, key = self.folder / DATABASE, self.folder / KEY
        if not make_new and not path.exists():
            raise RunError(
                "holds no memory.",
                where=str(self.folder),
                hint="Make one with: delible memory add FOLDER FILE",
            )
        with explain_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with explain_disk(self.folder), FileLock(self.folder / LOCK, mode=0o600):
            if not key.exists():
                if path.exists():
                    raise RunError(
                        "the key of this memory's hashes is gone.",
                        where=str(key),
                        hint="Bring it back: without it, what was deleted is not recognised.",
                    )
                with atomic_file(key, "wb") as file:
                    file.write(secrets.token_bytes(32))
                os.chmod(key, 0o600)
            with closing(connect(path)) as database:
                make(database)
            os.chmod(path, 0o600)


__all__ = ["DATABASE", "KEY", "LOCK", "Place"]
