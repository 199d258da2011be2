"""Atomic writes: a temporary name, then a rename, so that nothing is ever half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from delible.errors import RunError


@contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one clear message."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise RunError(
            "the disk is full.", where=str(path), hint="Free some space and run it again."
        ) from error
    except OSError as error:
        reasons = {
            errno.ENOSPC: ("the disk is full.", "Free some space and run the same command again."),
            errno.EDQUOT: ("the disk quota is used up.", "Free some space and run it again."),
            errno.EACCES: ("permission denied.", "Choose a folder you may write to."),
            errno.EROFS: ("the file system is read-only.", "Choose another folder."),
        }
        if error.errno not in reasons:
            raise
        problem, hint = reasons[error.errno]
        raise RunError(problem, where=str(path), hint=hint) from error


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[Any]:
    """Opens a temporary file beside ``path``; on success it takes the place of ``path``."""
    path = Path(path)
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; on success it takes the place of ``path``."""
    path = Path(path)
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            replaced = None
            if path.exists():
                replaced = path.with_name(f".{path.name}.replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(path, replaced)
            os.replace(temporary, path)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, keys in their given order."""
    with atomic_file(path) as handle:
        json.dump(content, handle, indent=2, ensure_ascii=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error}).", where=str(path)) from error
