"""Generic text for editors, and a cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from editing import GENERIC


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "generic.txt"
    file.write_text(GENERIC, "utf-8")
    return file
