"""Making an entry once: alone, whole, and within the bound of the cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from delible.errors import ModelError, RunError
from delible.files import UNFINISHED, clear_unfinished, explain_disk, refused_by_disk, write_json
from delible.kept import upkeep
from delible.kept.hashes import damage, remove, seal
from delible.kept.places import cache_folder, entry_of, lock_of
from delible.kept.using import using

logger = logging.getLogger(__name__)


@contextmanager
def alone(path: Path, *, required: bool = True) -> Iterator[bool]:
    """Nobody else makes or removes an entry meanwhile; a second process waits for the first.

    What lies in the cache counts as used by this process from here on, until it ends.

    Args:
        path: The entry: a file or a folder, which need not exist.
        required: Without it the work is of no use, so that it must be possible to write it.

    Yields:
        Whether it can be written. If not, that is said once, and what is there is used.

    Raises:
        RunError: It is required, not there and cannot be written; or the cache's bound is no size.
    """
    if entry_of(path) is not None:
        upkeep.size_bound()  # a wrong one is told before the work, not after it
    lock, there, writes = FileLock(lock_of(path)), path.exists(), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    except OSError as error:
        if required and not there:
            with explain_disk(path.parent):
                raise
        if refused_by_disk(error) is None:
            raise
        writes = False
        _say_once(
            str(path.parent if entry_of(path) is None else cache_folder()),
            error.strerror or str(error),
        )
    try:
        if writes:
            there = path.exists()  # another process may have made it just now
            use(path)
        yield writes
    finally:
        if writes:
            touch(path)
            with suppress(OSError):
                lock_of(path).unlink()
            lock.release()
    if writes and not there:
        keep_within(path)


def cell(
    path: Path | None,
    make: Callable[[], Mapping[str, Any]],
    then: Callable[[], object] | None = None,
    *,
    entry: Path | None = None,
) -> dict[str, Any]:
    """Plain data from its JSON file, or made now and kept there.

    Args:
        path: The file; None keeps nothing.
        make: Makes it. A result with the key ``failed`` is not kept, so that it is tried again.
        then: Called when it is kept, such as to remove what it was made from.
        entry: The folder that the file belongs to, if that is made as a whole.

    Returns:
        What the file says, or would say.

    Raises:
        RunError: It cannot be written.
    """
    if path is None:
        return dict(make())
    with alone(entry or path):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            logger.warning(f"{path} cannot be read ({error}): it is made anew.")
        found = json.loads(json.dumps(dict(make())))
        if "failed" not in found:
            write_json(path, found)
            if then is not None:
                then()
        return dict(found)


def folder(
    target: Path, make: Callable[[Path], Path], *, space: str, goes_on: bool = False
) -> Path:
    """A model's folder in the cache; made and sealed when it is missing or damaged.

    Args:
        target: The folder.
        make: Gets a folder to work in, and returns the one in it that becomes the target.
        space: What the disk needs for it, for people.
        goes_on: A killed or failed work is left for the next attempt, instead of nothing.

    Raises:
        ModelError: The cache cannot be written.
    """
    work = target.with_name(f".{target.name}{upkeep.BUILDING if goes_on else UNFINISHED}")
    try:
        with alone(target):
            if target.is_dir():
                if (found := damage(target)) is None:
                    return target
                logger.warning(f"{target} is damaged ({found}): it is made anew.")
                remove(target)
            if not goes_on:
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            work.mkdir(exist_ok=True)
            clear_unfinished(work)
            try:
                made = make(work)
                seal(made)
                os.replace(made, target)
                goes_on = False
            finally:
                if not goes_on:
                    shutil.rmtree(work, ignore_errors=True)
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ModelError(
            f"cannot write the cache: {error.problem if isinstance(error, RunError) else error}",
            where=str(cache_folder()),
            hint=f"Free some space ({space}), or set DELIBLE_CACHE to another folder.",
        ) from error
    return target


def use(path: Path) -> None:
    """Says that this process uses the entry of the cache at or above a path, until it ends.

    A path elsewhere is nobody's concern, and so is a cache that cannot be written: nothing goes
    from there.
    """
    entry = entry_of(path)
    if entry is not None:
        with suppress(OSError):
            using(cache_folder().absolute(), entry)
            touch(path)


def touch(path: Path) -> None:
    """Notes that the entry of the cache at or above a path was used now."""
    entry = entry_of(path)
    if entry is not None:
        with suppress(OSError):  # not there yet
            os.utime(entry)


def keep_within(path: Path) -> None:
    """Keeps the cache within its bound, if a path that has grown lies there."""
    if entry_of(path) is not None:
        upkeep.keep_within()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Another process makes or uses {path.name} just now: waiting for it.")
        lock.acquire()


@cache
def _say_once(place: str, reason: str) -> None:
    logger.warning(
        f"{place} cannot be written ({reason}): what is there is used, nothing new is kept."
    )
