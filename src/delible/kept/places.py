"""Where kept things lie, and what they are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Wheels that the user put into the cache by hand: read, never counted, never removed.
BY_HAND = "wheels"


@dataclass(frozen=True)
class Collection:
    """Entries of one kind.

    Attributes:
        holds: What they are, for people.
        again: What it costs to have one again, for people.
        folder: Below the cache; the collection's name if it is empty.
        depth: How many folders below it an entry lies.
        last: Goes only when nothing else is left to go.
    """

    holds: str
    again: str
    folder: str = ""
    depth: int = 1
    last: bool = False


#: By name. A folder of the cache that is not here is a collection, too.
COLLECTIONS = {
    "models": Collection("models of the package index, tiny, moe", "download or build", last=True),
    "learned": Collection("models that benchmarks taught", "training"),
    "answers": Collection("answers of measured models", "asking"),
    "attacks": Collection("what attacks on models found", "attacking", "answers/attacks"),
    "generated": Collection("rows that models wrote", "writing"),
    "judged": Collection("marks that judges gave", "judging"),
    "roles": Collection("replies of judges, writers …", "calls", depth=2),
    "corpora": Collection("biographies that models wrote", "writing"),
    "requests": Collection("requests that a model completed", "writing"),
    "saes": Collection("sparse autoencoders of layers", "training"),
    "statistics": Collection("what layers read on plain text", "reading"),
    "tune": Collection("options that searches found", "searching"),
}


def cache_folder() -> Path:
    """Where delible keeps what it can make again: ``DELIBLE_CACHE`` or the user's cache folder."""
    chosen = os.environ.get("DELIBLE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("delible"))


def identity(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain data (hexadecimal); two things with the same identity are the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def place(
    collection: str,
    described: Mapping[str, Any],
    *,
    title: str = "",
    ending: str = "",
    digits: int = 16,
) -> Path:
    """Where an entry of the cache lies.

    Args:
        collection: Its name in :data:`COLLECTIONS`.
        described: Everything that decides the content, as plain data.
        title: For people, at the beginning of the name.
        ending: Of a file's name, such as ``.json``.
        digits: Of the identity, in the name.
    """
    key = identity(described)[:digits]
    name = f"{title}-{key}{ending}" if title else f"{key}{ending}"
    return cache_folder() / (COLLECTIONS[collection].folder or collection) / name


def entry_of(path: Path) -> Path | None:
    """The entry of the cache to which a path belongs; None for a path elsewhere."""
    home = cache_folder().absolute()
    try:
        parts = path.absolute().relative_to(home).parts
    except ValueError:
        return None
    if not parts or parts[0] == BY_HAND:
        return None
    above, depth = 1, 1
    for name, one in COLLECTIONS.items():
        folder = Path(one.folder or name).parts
        if parts[: len(folder)] == folder and len(folder) >= above:
            above, depth = len(folder), one.depth
    return home.joinpath(*parts[: above + depth]) if len(parts) >= above + depth else None


def lock_of(path: Path) -> Path:
    """The lock of whoever makes or removes an entry."""
    return path.with_name(f".{path.name}.lock")
