"""One process at a time carries out the requests of a model, or takes one of them back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from delible.errors import RunError
from delible.files import explain_disk
from delible.ledger.store import Ledger


class BusyError(RunError):
    """Another process carries out requests at a model."""


@contextmanager
def alone(ledger: Ledger, model: str) -> Iterator[None]:
    """Nobody else carries out requests of this ledger at a model, or takes one back.

    Raises:
        BusyError: Somebody does.
        RunError: The disk refuses the lock.
    """
    known = hashlib.sha256(model.encode()).hexdigest()[:8]
    path = ledger.path.with_name(f".{ledger.path.name}-{known}.lock")
    lock = FileLock(path, timeout=0, is_singleton=False)
    try:
        with explain_disk(path):
            lock.acquire()
    except Timeout:
        raise BusyError(
            f"another process carries out requests at {model}.",
            where=str(ledger.path),
            hint="Wait until it ends, and run the same command again.",
        ) from None
    try:
        yield
    finally:
        lock.release()
