"""What an audit says of its measurements, and what it says it did not test."""

from __future__ import annotations

from pathlib import Path

import pytest

from delible.audit.findings import Findings, write_items
from delible.audit.leaks import Setting
from delible.audit.result import AuditResult, SystemInfo
from delible.measure.metric import Item, SystemValues
from delible.records import QA


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
    attacks = [Setting(attack, "", "An attack", notes=dict(notes))]
    untested = Findings({}, [], 0, plain, attacks)._untested()
    assert [line for line in untested if "(dua)" in line] == ([] if said is None else [said])
    assert (
        "What a determined person finds who tries for longer, or knows more, than these attacks."
        in untested
    )


RECORDS = [QA(question=f"q{index}", answer="a") for index in range(12)]
ATTACKS = (("prefix", "prompt"), ("relearn", "relearning"), ("quantize", "quantization"))


def values(forget: float) -> SystemValues:
    """One measure; everything that should be kept is kept."""
    splits = {"forget": forget, "retain": 0.9, "holdout": 0.2}
    items = {split: [Item(value)] * len(RECORDS) for split, value in splits.items()}
    return SystemValues("m", {"answer_probability": items}, {"answer_probability": splits})


def result(unlearned: float, *, reference: bool = True, weights: bool = True) -> AuditResult:
    """An audit in which attacks change all values a little, and bring nothing back."""

    def row(attack: str, family: str, more: float) -> Setting:
        found = {"unlearned": values(unlearned + more), "original": values(0.9 - more)}
        if reference:
            found["reference"] = values(0.2 + more)
        return Setting(
            attack, "", attack, found, records=RECORDS, family=family,  # type: ignore[arg-type]
            changes="weights" if family not in ("", "prompt") else "prompts",
        )  # fmt: skip

    findings = Findings(
        {"forget": RECORDS, "retain": RECORDS, "holdout": RECORDS}, [], 0, row("none", "", 0.0),
        [row(attack, family, 0.01) for attack, family in ATTACKS],
    )  # fmt: skip
    findings.answers["unlearned"] = {}
    for role in findings.plain.values:
        findings.infos[role] = SystemInfo(
            name=role, capabilities=["weights"] if weights else ["generate"]
        )
    return findings.result(0.0, {})


def test_clean_values_are_consistent_with_removal() -> None:
    found = result(0.2)
    assert found.verdict is not None
    assert found.verdict.label == "removal-consistent", found.verdict.reasons
    assert [part.kept for part in found.utility.parts] == [1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("reference", [True, False])
def test_over_forgetting_is_no_removal(reference: bool) -> None:
    found = result(0.01, reference=reference)
    assert found.verdict is not None
    assert found.verdict.label == "undetermined"
    told = " ".join(found.verdict.reasons)
    assert "5% of the probability" in told
    assert result(0.15, reference=reference).verdict.label == "removal-consistent"  # type: ignore[union-attr]


def test_what_was_never_seen_is_the_floor_without_a_reference() -> None:
    # 0.35 against an original of 0.9: below 0.8 over a floor of 0.2, above it over a floor of 0
    found = result(0.35, reference=False)
    assert found.leaks[0].erased["answer_probability"] == pytest.approx(1 - 0.15 / 0.7)
    assert found.verdict is not None
    assert found.verdict.label == "incomplete"


def test_without_weights_removal_is_not_said() -> None:
    found = result(0.2, weights=False)
    assert found.verdict is not None
    assert found.verdict.label == "undetermined"


def test_the_files_hold_what_every_e_is_made_of(tmp_path: Path) -> None:
    """Another script must find each form's value, and the same record under another attack."""
    import pyarrow.parquet as parquet

    twice = [*RECORDS[:4], RECORDS[0]]
    plain = Setting(
        "none", "", "Asked plainly",
        {"unlearned": SystemValues("m", {"outcome": {"forget": [Item(0.5)] * 5}})}, records=twice,
    )  # fmt: skip
    judged = [twice[3], twice[0], twice[0]]
    forms = [Item(0.5, forms=(0.25, None, 0.75)), Item(None, "no prompt"), Item(0.1)]
    attack = Setting(
        "relearn", "", "Relearning", {"unlearned": SystemValues("m", {"outcome": {
            "forget": forms, "holdout": [Item(0.5)]}})}, records=judged,
    )  # fmt: skip
    write_items(tmp_path / "items.parquet", [plain, attack])
    rows = parquet.read_table(tmp_path / "items.parquet").to_pylist()
    found = [row for row in rows if row["attack"] == "relearn"]
    assert [(row["split"], row["record"]) for row in found] == [
        ("forget", 3), ("forget", 0), ("forget", 4), ("holdout", 0),
    ]  # fmt: skip
    assert [row["forms"] for row in found] == [[0.25, None, 0.75], [], [], []]
    assert [row["value"] for row in found] == [0.5, None, 0.1, 0.5]
