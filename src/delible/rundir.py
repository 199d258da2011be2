"""The run directory: everything that a run was and left behind.

``manifest.json`` (resolved config, seeds, versions, data hashes, git revision, start and end,
hardware, cost), ``events.jsonl`` (append-only progress), the artefact (``artefact.yaml`` and its
parts), ``metrics.json`` with ``items.parquet``, ``report.html``; while it runs also
``checkpoint/``. A manifest is enough to run it again.

A run has one writer: whoever writes holds ``.lock``. The system lets go of it when a process ends,
however it ends, so that a killed run blocks nobody; what it left half-written goes when the next
one starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from delible.errors import RunError
from delible.files import UNFINISHED, clear_unfinished, explain_disk, write_json
from delible.kept import identity

#: Held by the process that writes a run.
LOCK = ".lock"
PACKAGES = ("delible", "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy")


def _set(content: Any) -> Any:
    """Plain data without what is none: an option that a later version added, and that is off."""
    if isinstance(content, Mapping):
        return {key: _set(value) for key, value in content.items() if value is not None}
    if isinstance(content, list | tuple):
        return [_set(value) for value in content]
    return content


class OtherRunError(RunError):
    """A folder holds another run than the one that is to be made there."""


class RunDirectory:
    """One run on disk.

    Args:
        path: Its folder; made when the run starts.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        #: Of several processes that train together, the first one writes.
        self.writes = os.environ.get("RANK", "0") == "0"
        self._lock: FileLock | None = None

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, empty if there is none.

        Raises:
            RunError: It is not valid JSON.
        """
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise RunError(
                "the manifest is broken.",
                where=str(self.manifest_path),
                hint="Choose another --out folder, or delete this one.",
            ) from None

    def begin(self, run: Mapping[str, Any]) -> bool:
        """Starts or resumes a run; returns whether it was finished before.

        Args:
            run: Everything that determines the result: command, recipe, seed, hashes of model
                and data.

        Raises:
            RunError: The folder holds another run, or something that is not a run, or another
                process writes it.
        """
        if self._is_done(run):
            return True
        self.lock()
        if self._is_done(run):  # by a process that has ended just now
            self.release()
            return True
        found = self.manifest
        mine = found.get("identity", identity(run))
        manifest = {
            "identity": mine,
            "status": "running",
            "run": dict(run),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": found.get("started") or _now(),
            "resumed": [*found.get("resumed", []), *([_now()] if found else [])],
            "versions": versions(),
            "git": git_revision(),
            "hardware": hardware(),
        }
        if self.writes:
            write_json(self.manifest_path, manifest)
        return False

    def _is_done(self, run: Mapping[str, Any]) -> bool:
        """Whether the folder holds this run, finished; nothing needs to be written then.

        Raises:
            OtherRunError: It holds another run.
        """
        found = self.manifest
        if found and found.get("identity") != identity(run):
            mine, theirs = _set(run), _set(found.get("run", {}))
            changed = sorted(
                key
                for key in {*mine, *theirs}
                if identity({key: mine.get(key)}) != identity({key: theirs.get(key)})
            )
            if changed:
                raise OtherRunError(
                    f"this folder holds another run (different: {', '.join(changed)}).",
                    where=str(self.path),
                    hint="Choose another --out folder, or delete this one.",
                )
        return found.get("status") == "done"

    def lock(self) -> None:
        """Becomes the folder's only writer, until :meth:`release` or the end of the process.

        Raises:
            RunError: Another process writes it, or it is not the folder of a run.
        """
        if self._lock is not None or not self.writes:
            return
        if not self.manifest and self.path.exists() and not _is_empty(self.path):
            raise RunError(
                "this path exists and is not a run directory.",
                where=str(self.path),
                hint="Choose another --out folder.",
            )
        # one lock per process: a run that failed here may be started again, whoever still holds it
        lock = FileLock(
            self.path.absolute() / LOCK, timeout=0, thread_local=False, is_singleton=True
        )
        try:
            with explain_disk(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                if lock.lock_counter == 1:
                    clear_unfinished(self.path)
        except Timeout:
            raise RunError(
                "another process is writing this run.",
                where=str(self.path),
                hint="Wait until it ends, or choose another --out folder.",
            ) from None
        self._lock = lock

    def release(self) -> None:
        """Lets another process write."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink()
            self._lock.release(force=True)
            self._lock = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder's only writer for a while (for longer if it was that before)."""
        held = self._lock is not None
        self.lock()
        try:
            yield
        finally:
            if not held:
                self.release()

    def update(self, **fields: Any) -> None:
        """Adds fields to the manifest."""
        if self.writes:
            write_json(self.manifest_path, {**self.manifest, **fields})

    def finish(self, **fields: Any) -> None:
        """Marks the run as done."""
        self.update(status="done", ended=_now(), **fields)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to ``events.jsonl``."""
        if not self.writes:
            return
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, default=str)
        path = self.path / "events.jsonl"
        with explain_disk(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """The events so far; a half-written last line is left out."""
        path = self.path / "events.jsonl"
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing but what a run that hardly began leaves behind."""
    return path.is_dir() and all(
        one.name == LOCK or one.name.endswith(UNFINISHED) for one in path.iterdir()
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_digest() -> str:
    """The first digits of a SHA-256 over delible's own modules, whatever its version says."""
    whole, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        whole.update(f"{path.relative_to(package).as_posix()}\0".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def git_revision() -> str | None:
    """The revision of the code, if it runs from a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine, and what it computes in unasked."""
    import psutil
    import torch

    from delible.precision import resolve

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision": resolve("auto", "cuda" if torch.cuda.is_available() else "cpu"),
    }
