"""Ledgers in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from delible.ledger import database
from delible.ledger.store import Ledger


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not waited for: that guards against power cuts, which no test makes."""
    quick = [one.replace("EXTRA", "OFF") for one in database.SETTINGS]
    monkeypatch.setattr(database, "SETTINGS", tuple(quick))


@pytest.fixture
def ticking() -> Callable[[], str]:
    """A clock that goes on by a minute whenever it is looked at."""
    minutes: Iterator[int] = count()
    return lambda: f"2026-03-01T10:{next(minutes) % 60:02d}:00+00:00"


@pytest.fixture
def ledger(tmp_path: Path, ticking: Callable[[], str]) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite", clock=ticking, create=True)
