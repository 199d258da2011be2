"""Atomic writes, what killed writers leave, and what a disk refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from delible.errors import RunError
from delible.files import (
    atomic_file,
    atomic_folder,
    clear_unfinished,
    explain_disk,
    refused_by_disk,
)


def test_what_a_killed_writer_leaves_is_cleared(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from delible.files import atomic_file, atomic_folder
with atomic_folder(Path(sys.argv[1]) / "model") as folder, atomic_file(folder.parent / "m.json"):
    (folder / "weights").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".hidden").write_text("the user's own")
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", ".hidden"]


def test_a_folder_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """Killed between the two moves, or after both."""
    for name in ("model", "checkpoint"):
        moved = tmp_path / f".{name}.replaced"
        moved.mkdir()
        (moved / "weights").write_text(f"old {name}")
    with atomic_folder(tmp_path / "checkpoint") as folder:
        (folder / "weights").write_text("new checkpoint")
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]
    assert (tmp_path / "model" / "weights").read_text() == "old model"
    assert (tmp_path / "checkpoint" / "weights").read_text() == "new checkpoint"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.json"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "larger than"),
        (errno.EACCES, "permission denied"), (errno.EPERM, "permission denied"),
        (errno.EROFS, "read-only"), (errno.EIO, "read or write error"),
        (errno.ENAMETOOLONG, "too long"), (errno.EMFILE, "too many files"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rust", [False, True])
def test_what_a_disk_refuses_is_one_message(number: int, words: str, rust: bool) -> None:
    error: Exception = OSError(number, "?")
    if rust:  # as the writer of safetensors says it
        error = SafetensorError(f"Error while serializing: I/O error: ? (os error {number})")
    with pytest.raises(RunError, match=words) as caught, explain_disk(Path("/x/model")):
        raise error
    assert caught.value.where == "/x/model"
    assert caught.value.hint


def test_other_errors_are_left_alone() -> None:
    for error in (OSError(errno.EPIPE, "?"), SafetensorError("header too large"), ValueError("?")):
        assert refused_by_disk(error) is None
        with pytest.raises(type(error)), explain_disk(Path("/x")):
            raise error


def test_a_limit_of_the_file_size_is_named(tmp_path: Path) -> None:
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import save_file
from delible.errors import RunError
from delible.files import atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for big in ("weights", "text"):
    try:
        with atomic_folder(Path(sys.argv[1]) / big) as folder:
            if big == "weights":
                save_file({"w": np.zeros(9999)}, folder / "w.safetensors")
            else:
                (folder / "t").write_bytes(b"x" * 9999)
    except RunError as error:
        print(error.where, error.problem)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("the file is larger than this place allows" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
