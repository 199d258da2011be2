"""Atomic writes: a temporary name, then a rename, so that nothing is ever half there.

A writer that is killed leaves its temporary name behind; the next one with the folder's lock
removes it (:func:`clear_unfinished`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from delible.errors import RunError

#: Ends the name of what is still being written, and of what was there before.
UNFINISHED, REPLACED = ".unfinished", ".replaced"

_SPACE = "Free some space and run the same command again."
_PLACE = "Choose another folder."
#: What a disk or its rights may refuse: error number -> what is wrong, and what to do.
_REFUSED = {
    errno.ENOSPC: ("the disk is full.", _SPACE),
    errno.EDQUOT: ("the disk quota is used up.", _SPACE),
    errno.EFBIG: (
        "the file is larger than this place allows (a limit of the file system, or of ulimit -f).",
        "Raise the limit, or choose another folder.",
    ),
    errno.EACCES: ("permission denied.", "Choose a folder you may write to."),
    errno.EPERM: ("permission denied.", "Choose a folder you may write to."),
    errno.EROFS: ("the file system is read-only.", _PLACE),
    errno.EIO: ("the disk reports a read or write error.", "Check the disk, or use another one."),
    errno.ENAMETOOLONG: ("the name is too long for this file system.", "Choose a shorter one."),
    errno.EISDIR: ("it is a folder, not a file.", "Choose another path."),
    errno.EEXIST: ("a file is in the way of a folder.", "Choose another path."),
    errno.ENOTDIR: ("a part of the path is a file, not a folder.", "Choose another path."),
    errno.EMFILE: ("too many files are open.", "Raise the limit (ulimit -n)."),
    errno.ENFILE: ("too many files are open on this machine.", "Close some programs."),
}


def refused_by_disk(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and what to do, if an error is that of a disk or of its rights."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    return None if number is None else _REFUSED.get(number)


@contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into one clear message."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        known = refused_by_disk(error)
        if known is None:
            raise
        problem, hint = known
        raise RunError(problem, where=str(path), hint=hint) from error


@contextmanager
def atomic_file(path: Path, mode: str = "w", *, private: bool = False) -> Iterator[Any]:
    """Opens a temporary file beside ``path``; on success it takes the place of ``path``.

    Args:
        private: Nobody but the owner may read it, at any time.
    """
    path = Path(path)
    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
        )
        try:
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o600 if private else 0o644)
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
        temporary = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        )
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            replaced = None
            if path.exists():
                replaced = path.with_name(f".{path.name}{REPLACED}")
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(path, replaced)
            os.replace(temporary, path)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def clear_unfinished(folder: Path) -> None:
    """Removes what killed writers left below a folder, and puts back what they had moved away.

    Only for whoever holds the folder's lock: what is there now, nobody is writing.
    """
    for path in sorted(folder.rglob(".*")):
        if path.name.endswith(REPLACED):
            target = path.with_name(path.name[1 : -len(REPLACED)])
            if not target.exists():  # killed between the two moves: this is the last whole one
                with explain_disk(target):
                    os.replace(path, target)
                continue
        elif not path.name.endswith(UNFINISHED):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


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


class Followed:
    """A file that somebody else writes: tells when there is something new to read.

    A change counts when two looks find it alike: before that, half of it may be there.

    Args:
        path: The file, as it is read now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = self._looked = self._state()

    def changed(self) -> bool:
        """Whether it is to be read again. True once for each change."""
        now = self._state()
        before, self._looked = self._looked, now
        if now is None or now == self._read or now != before:  # None: gone, or being replaced
            return False
        self._read = now
        return True

    def seen(self) -> None:
        """It was read, or written, now."""
        self._read = self._looked = self._state()

    def _state(self) -> tuple[int, int, int] | None:
        try:
            state = self.path.stat()
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns, state.st_size
