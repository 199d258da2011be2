"""Tiny models are fastest on one thread; on two, threads wait for each other. A stub judge."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def stub_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every judge that a metric names gives each of its criteria another grade."""
    from delible.measure.scoring import judging
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

    monkeypatch.setattr(judging, "open_system", lambda name: StubJudge())
