"""The cache as a whole: what lies there, how large it may grow, and what goes.

When an entry was last used is its time of change: who uses it touches it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from delible.errors import RunError
from delible.files import UNFINISHED
from delible.kept.places import BY_HAND, COLLECTIONS, cache_folder, lock_of
from delible.kept.using import used_now

logger = logging.getLogger(__name__)

#: Ends the name of what is being removed; and of a long work that a killed process left.
REMOVED, BUILDING = ".removed", ".building"
#: Nobody works on a thing for so long without changing it.
ABANDONED_SECONDS = 24 * 3600.0
#: Bytes that the cache may hold, unless DELIBLE_CACHE_SIZE says otherwise.
USUAL_BOUND = 20 * 10**9
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
#: Entries that are named one by one when they go.
_NAMED = 3


@dataclass(frozen=True)
class Entry:
    """A kept thing.

    Attributes:
        collection: Its name.
        path: The file or folder.
        bytes: Its size on disk, with everything below it.
        used: When it was made or last used, in seconds since 1970.
    """

    collection: str
    path: Path
    bytes: int
    used: float


def size_bound() -> int:
    """Bytes that the cache may hold: ``DELIBLE_CACHE_SIZE``, such as ``500MB`` or ``1.5 TB``.

    Raises:
        RunError: It is no size.
    """
    given = os.environ.get("DELIBLE_CACHE_SIZE", "").strip()
    if not given:
        return USUAL_BOUND
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])b?", given, re.IGNORECASE)
    if read is None:
        raise RunError(
            f"'{given}' is no size.",
            where="DELIBLE_CACHE_SIZE",
            hint="Write a number and a unit, such as 500MB or 20GB.",
        )
    return int(float(read[1]) * _UNITS[read[2].lower()])


def in_words(size: int) -> str:
    """A size as people read it, such as "1.5 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def entries(collection: str | None = None) -> list[Entry]:
    """What is kept in the cache, the least recently used first.

    Args:
        collection: Only what lies in this one.
    """
    found = []
    for name, folder, depth in _collections():
        if collection not in (None, name):
            continue
        inner = {folder.parent / one.folder for one in COLLECTIONS.values() if one.folder}
        for path in folder.glob("/".join("*" * depth)):
            if not path.name.startswith(".") and path.suffix != ".lock" and path not in inner:
                with suppress(OSError):  # removed by another process just now
                    found.append(Entry(name, path, _size(path), path.stat().st_mtime))
    return sorted(found, key=lambda one: one.used)


def clear(
    collection: str | None = None, older_than: float = 0.0
) -> tuple[list[Entry], list[Entry]]:
    """Removes what is not in use.

    Args:
        collection: Only what lies in this one.
        older_than: Only what was not used for so many days.

    Returns:
        What went, and what stayed because somebody uses or makes it.
    """
    until = time.time() - older_than * 86_400
    chosen = [one for one in entries(collection) if older_than == 0 or one.used <= until]
    gone = [one for one in chosen if _remove(one)]
    _sweep()
    return gone, [one for one in chosen if one not in gone]


def keep_within(bound: int | None = None) -> list[Entry]:
    """Removes what was not used for the longest, until the cache is no larger than its bound.

    Models of the package index go last; what is in use stays.

    Args:
        bound: Bytes; None: :func:`size_bound`.

    Returns:
        What went.
    """
    bound = size_bound() if bound is None else bound
    _sweep()
    everything = entries()
    whole = sum(one.bytes for one in everything)
    if whole <= bound:
        return []
    last = {name for name, one in COLLECTIONS.items() if one.last}
    gone: list[Entry] = []
    left = whole
    for one in sorted(everything, key=lambda one: one.collection in last):  # keeps their order
        if left <= bound:
            break
        if _remove(one):
            gone.append(one)
            left -= one.bytes
    if gone:
        names = ", ".join(f"{one.collection}/{one.path.name}" for one in gone[:_NAMED])
        more = f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else ""
        logger.info(
            f"The cache held {in_words(whole)}, more than {in_words(bound)} (DELIBLE_CACHE_SIZE): "
            f"what was not used for the longest is removed ({names}{more})."
        )
    return gone


def _collections() -> Iterator[tuple[str, Path, int]]:
    """Name, folder and depth of every collection that there is."""
    home = cache_folder().absolute()
    known = {one.folder or name: (name, one.depth) for name, one in COLLECTIONS.items()}
    other = {path.name: (path.name, 1) for path in home.glob("[!.]*")}
    for folder, (name, depth) in {**other, **known}.items():
        if folder != BY_HAND and (home / folder).is_dir():
            yield name, home / folder, depth


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _remove(entry: Entry) -> bool:
    """Removes an entry at once or not at all; not if somebody uses or makes it."""
    home, lock = cache_folder().absolute(), FileLock(lock_of(entry.path))
    away = entry.path.with_name(f".{entry.path.name}.{uuid.uuid4().hex[:8]}{REMOVED}")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        # whoever uses it has said so under this lock
        if entry.path.relative_to(home).as_posix() in used_now(home):
            return False
        os.replace(entry.path, away)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            lock_of(entry.path).unlink()
        lock.release()
    _delete(away)
    return True


def _sweep() -> None:
    """Removes what killed processes left: half-removed entries, and half-made ones of old."""
    for _, folder, depth in _collections():
        for path in folder.glob("/".join([*"*" * (depth - 1), ".*"])):
            with suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if path.name.endswith(REMOVED) or (
                    path.name.endswith((UNFINISHED, BUILDING)) and age > ABANDONED_SECONDS
                ):
                    _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
