"""Folders that are kept and used again: whole, or made anew.

A model in the cache outlives the process that made it, and the disk, a copy or a hand may damage
it since. So it carries the hashes of its files, and whoever uses it compares them first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

from delible.errors import RunError
from delible.files import write_json

#: Lies in a kept folder: file name -> size in bytes and SHA-256.
HASHES = "hashes.json"


def seal(folder: Path) -> None:
    """Writes down the hashes of a folder's files."""
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    write_json(folder / HASHES, found)


def damage(folder: Path) -> str | None:
    """What differs from when the folder was sealed; None if nothing does.

    A folder without hashes, as earlier versions kept them, counts as whole if its safetensors are
    as long as they say, and is sealed. Files are read once per process (0.5 s a gigabyte or so).
    """
    try:
        noted = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        known = {name: (int(one["bytes"]), str(one["sha256"])) for name, one in noted.items()}
    except FileNotFoundError:
        return _unsealed(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{HASHES} cannot be read"
    for name, (size, sha256) in known.items():
        path = folder / name
        try:
            status = path.stat()
            if status.st_size != size:
                return f"{name} has {status.st_size:,} bytes, not {size:,}"
            if _hash_of(path, status.st_size, status.st_mtime_ns) != sha256:
                return f"{name} has other content"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def remove(folder: Path) -> None:
    """Removes a damaged folder, so that it is made anew.

    Raises:
        RunError: It cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise RunError(
            f"it is damaged and cannot be removed ({error.strerror or error}).",
            where=str(folder),
            hint="Delete the folder, or set DELIBLE_CACHE to another one.",
        ) from error


def _unsealed(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not _files(folder):
        return "it holds no files"
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):  # reads the header, and compares the length
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    with suppress(OSError, RunError):  # a read-only place: compared again next time
        seal(folder)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != HASHES and not path.name.startswith(".")
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    """Remembered for as long as a file's length and time of change stay the same."""
    return _sha256(path)
