"""What the container files copy is there, and nobody in them is root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "examples/deploy" / name for name in ("cpu.Containerfile", "cuda.Containerfile")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there_and_enough(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = [
        word
        for line in re.findall(r"^COPY --chown=\S+ (.+)$", text, re.M)
        for word in line.split()[:-1]
    ]
    assert all((ROOT / one).exists() for one in copied)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    ready = re.search(r"^\$\(READY\): (.+)$", makefile, re.M)
    assert ready is not None
    assert {*ready[1].split(), "Makefile", "src", "tests", "docs"} <= {*copied}
    assert text.index("make .venv/.ready") > text.index("COPY --chown=delible:delible src")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs_the_two_commands_as_somebody_with_a_cache(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"delible(?:-cuda)? (make \w+)", text) == ["make demo", "make test"]
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert users == ["10001"]
    assert text.index("USER 10001") < text.index("COPY")
    volume = re.search(r"^VOLUME (\S+)$", text, re.M)
    cache = re.search(r"DELIBLE_CACHE=(\S+)", text)
    assert volume is not None
    assert cache is not None
    assert cache[1].startswith(volume[1])
    version = re.search(r"^FROM docker\.io/library/python:(\d+\.\d+)-slim", text, re.M)
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert version is not None
    assert f"Python {version[1]}" in lock.replace("\n# ", " ")
