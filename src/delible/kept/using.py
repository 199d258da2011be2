"""Which entries of the cache are in use: each process says what it uses, for as long as it lives.

A process holds one lock in ``.using`` and lists its entries beside it. The system lets go of the
lock when the process ends, however it ends; so a list whose lock is free is nobody's.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

#: Below the cache.
FOLDER = ".using"


class _List:
    """What this process uses."""

    def __init__(self, home: Path) -> None:
        used_now(home)  # clears away what dead processes left
        self.file = home / FOLDER / f"{uuid.uuid4().hex}.txt"
        self.names: set[str] = set()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.file.with_suffix(".lock"), thread_local=False)
        self.lock.acquire()

    def add(self, name: str) -> None:
        if name not in self.names:
            self.names.add(name)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(f"{name}\n")


#: By process and cache. A forked child leaves its parent's alone: closing it would free its lock.
_mine: dict[tuple[int, Path], _List] = {}


def using(home: Path, entry: Path) -> None:
    """Says that this process uses an entry, until it ends.

    Raises:
        OSError: The cache cannot be written; then nothing of it is removed from here, either.
    """
    key = (os.getpid(), home)
    if key not in _mine:
        _mine[key] = _List(home)
    _mine[key].add(entry.relative_to(home).as_posix())


def used_now(home: Path) -> set[str]:
    """Names of the entries that living processes use, relative to the cache."""
    found: set[str] = set()
    for held in (home / FOLDER).glob("*.lock"):
        names, lock = held.with_suffix(".txt"), FileLock(held)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            with suppress(OSError):
                found.update(names.read_text(encoding="utf-8").splitlines())
            continue
        with suppress(OSError):
            names.unlink(missing_ok=True)
            held.unlink(missing_ok=True)
        lock.release()
    return found
