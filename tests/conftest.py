"""Tiny models are fastest on one thread; on two, threads wait for each other. A stub judge."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def reopened_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved model is opened in this process: a new one takes seconds for every test.

    Tests marked ``new_process`` get the real thing.
    """
    if request.node.get_closest_marker("new_process") is None:
        from delible import reload

        def here(folder: Path, precision: str, content: list[dict[str, Any]]) -> Any:
            return reload.reopened(str(folder), precision, content)

        monkeypatch.setattr(reload, "ask_again", here)


@pytest.fixture(autouse=True)
def everything_told_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    """``caplog.messages`` are the sentences that delible tells."""
    caplog.set_level("INFO", "delible")


@pytest.fixture
def stub_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every judge that a metric names gives each of its criteria another grade."""
    from delible.measure import starting
    from delible.system.asks import Decoding, Prompt
    from delible.system.base import BlackBox

    names = ("relevance", "rejection", "helpfulness", "readability", "specificity", "logic")
    reply = json.dumps(
        {name: {"score": place, "reason": "so"} for place, name in enumerate(names, start=2)}
    )

    class StubJudge(BlackBox):
        name, fingerprint = "stub", None

        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
            return [reply] * len(prompts)

    monkeypatch.setattr(starting, "open_system", lambda name: StubJudge())
