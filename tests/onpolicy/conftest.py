"""Runs on a tiny model, without looking for garbage in all that is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _nothing_loaded_is_garbage() -> Iterator[None]:
    """Accelerate collects garbage before every run, which takes a second for a whole library."""
    pytest.importorskip("trl", reason="needs the extra rl")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
