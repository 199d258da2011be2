"""A tiny model on disk, a few records, and two ways to run the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs_of_commands import Ran, Run


def records(name: str, numbers: Sequence[int]) -> str:
    return "".join(
        json.dumps({"question": f"{name} of person {number}?", "answer": f"{name} {number}."})
        + "\n"
        for number in numbers
    )


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of whatever runs the tests must not show."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with forget and retain records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "forget.jsonl").write_text(records("Town", range(3)), encoding="utf-8")
    (tmp_path / "retain.jsonl").write_text(records("Job", range(5)), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model and its tokenizer."""
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""
    from delible.cli import main

    def call(*words: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call


@pytest.fixture
def process(here: Path) -> Run:
    """Runs Python code or ``delible`` in a process of its own."""

    def call(*words: str | Path, code: str | None = None) -> Ran:
        start = ["-m", "delible"] if code is None else ["-c", code]
        done = subprocess.run(
            [sys.executable, *start, *map(str, words)],
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return call
