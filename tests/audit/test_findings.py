"""What an audit says it did not test."""

from __future__ import annotations

import pytest

from delible.audit.findings import Findings, Setting
from delible.measure.metric import SystemValues


@pytest.mark.parametrize(
    ("attack", "notes", "said"),
    [
        ("prefix", {}, "Searched suffixes (dynamic unlearning attack) (dua): not run."),
        ("dua", {}, None),
        ("dua", {"skipped": "not run: no original"}, "An attack (dua): not run: no original."),
    ],
)
def test_an_attack_that_was_not_run_is_named_once(
    attack: str, notes: dict[str, str], said: str | None
) -> None:
    plain = Setting("none", "", "Asked plainly", {"unlearned": SystemValues("m", {})})
    settings = [plain, Setting(attack, "", "An attack", notes=dict(notes))]
    untested = Findings({}, [], 0, False, settings, [])._untested()
    assert [line for line in untested if "(dua)" in line] == ([] if said is None else [said])
    assert "Attacks with another model as attacker." in untested
