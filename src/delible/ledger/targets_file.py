"""Entries of requests in the file of targets that guards go by; a gateway reads it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from delible.errors import RunError
from delible.files import explain_disk
from delible.ledger.requests import Texts
from delible.systems.targets import Target, Targets, read_targets, write_targets

PATIENCE = 5.0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE)
    try:
        with explain_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise RunError(
            "another process is writing this file of targets.",
            where=str(path),
            hint="Run the same command again when it has ended.",
        ) from None
    try:
        yield
    finally:
        lock.release()


def add_entry(path: Path, request: str, texts: Texts) -> None:
    """Writes a request's entry, which has names, unless it is there.

    The entry is known by the request's id, so that it can be taken out again.
    """
    with _locked(path):
        here = read_targets(path).targets if path.exists() else ()
        if all(one.id != request for one in here):
            about = [one for one in texts.records if one.subject in (None, texts.names[0])]
            entry = Target(
                id=request, names=texts.names[:1], aliases=texts.names[1:], records=tuple(about),
                asked_by=f"request {request}",
            )  # fmt: skip
            write_targets(Targets(targets=(*here, entry)), path)


def drop_entry(path: Path, request: str) -> bool:
    """Takes a request's entry out; False: it is the last one, and a guard needs one to go by."""
    if not path.exists():
        return True
    with _locked(path):
        here = read_targets(path).targets
        left = tuple(one for one in here if one.id != request)
        if not left:
            return False
        if len(left) < len(here):
            write_targets(Targets(targets=left), path)
    return True
