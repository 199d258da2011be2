"""What an audit says it did not test."""

from __future__ import annotations

import pytest

from delible.audit.findings import Findings, Setting
from delible.metrics.base import SystemValues


@pytest.mark.parametrize(
    ("attack", "notes", "said"),
    [
        ("prefix", {}, True),
        ("dua", {}, False),
        ("dua", {"skipped": "not run: it needs the original"}, True),
    ],
)
def test_suffixes_count_as_tested_when_the_search_for_them_was_run(
    attack: str, notes: dict[str, str], said: bool
) -> None:
    plain = Setting("none", "", "Asked plainly", {"unlearned": SystemValues("m", {})})
    settings = [plain, Setting(attack, "", "An attack", notes=dict(notes))]
    findings = Findings({}, [], 0, False, settings, [])
    untested = " ".join(findings._untested())
    assert ("Adversarial suffixes found by search" in untested) is said
    assert "Attacks with another model as attacker." in untested
    assert ("An attack (dua): not run" in untested) is bool(notes)
