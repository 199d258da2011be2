"""Tests kill processes, not machines: nothing needs to wait for the disk."""

from __future__ import annotations

import os

import pytest

from delible.memory import database


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(os, "fsync", lambda _: None)
