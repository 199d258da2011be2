"""The sentence that the user reads, for systems whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nine_systems import ATTACKS, METRICS, REQUEST, ROWS, Systems

from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.cli import main
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.system.base import System


@pytest.fixture(autouse=True)
def cache(audit_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", audit_cache)


def audited(
    systems: Systems, system: System, *, reference: bool = True, retain: bool = True
) -> AuditResult:
    request = REQUEST if retain else REQUEST.model_copy(update={"retain": ()})
    return audit(
        system, request, before=systems.untouched,
        reference=systems.retrained if reference else None, metrics=METRICS, attacks=ATTACKS,
        rows=ROWS,
    )  # fmt: skip


EXPECTED = {
    "untouched": "incomplete",
    "retrained": "removal-consistent",
    "refusing": "suppression",
    "paraphrasing": "incomplete",
    "ruined": "destructive",
    "string_gated": "suppression",
    "adapter_gated": "suppression",
    "constant": "destructive",
    "random": "destructive",
}


#: The labels of these are read where the command prints them.
PRINTED = {
    "untouched": "Verdict: incomplete. The knowledge is still there.",
    "refusing": "Verdict: suppression. The answers are hidden, not gone.",
    "retrained": "Verdict: removal-consistent.",
    "ruined": "Verdict: destructive.",
}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in PRINTED])
def test_the_label_is_the_truth(systems: Systems, name: str) -> None:
    found = audited(systems, getattr(systems, name))
    assert found.verdict is not None
    told = "\n".join(found.verdict.reasons)
    assert found.verdict.label == EXPECTED[name], told
    assert "removed" not in told


def test_saying_it_in_other_words_is_found_by_the_answers_in_meaning(systems: Systems) -> None:
    found = audited(systems, systems.paraphrasing)
    plain = found.leaks[0]
    said_anew = plain.erased["answer_probability"]
    assert said_anew is not None
    assert said_anew > 0.5  # which alone looks as if most of it were gone
    assert plain.erased["outcome"] == pytest.approx(0.0, abs=0.1)
    assert plain.erased["paraphrase_probability"] is None or plain.knowledge[
        "paraphrase_probability"]["unlearned"] > 0.5  # type: ignore[operator]  # fmt: skip


@pytest.mark.parametrize("name", ["untouched", "random", "ruined", "constant"])
def test_without_reference_and_retain_records(systems: Systems, name: str) -> None:
    found = audited(systems, getattr(systems, name), reference=False, retain=False)
    assert found.verdict is not None
    assert found.verdict.label == EXPECTED[name], found.verdict.reasons
    assert found.verdict.without_reference


def test_another_retraining_is_no_worse_than_undetermined(systems: Systems) -> None:
    found = audited(systems, systems.retrained_again)
    assert found.verdict is not None
    assert found.verdict.label in ("removal-consistent", "undetermined"), found.verdict.reasons


def test_a_part_that_can_be_taken_away_has_a_row_in_which_nothing_is_erased(
    systems: Systems,
) -> None:
    for system, part in (
        (systems.string_gated, "guard 'target_detector'"),
        (systems.adapter_gated, "adapter"),
    ):
        found = audited(systems, system)
        (row,) = (leak for leak in found.leaks if leak.attack == "without_part")
        assert row.variant == part
        known = {measure: value for measure, value in row.erased.items() if value is not None}
        assert set(known) >= {"answer_probability", "outcome"} or "guard" in part
        assert known
        assert known == pytest.approx(dict.fromkeys(known, 0.0), abs=0.02)
        assert found.verdict is not None
        assert part in " ".join(found.verdict.reasons)


def test_guards_in_a_row_are_taken_away_one_after_the_other(systems: Systems) -> None:
    from delible.systems.guarded import guard

    nested = guard(systems.string_gated, REQUEST, similarity=False)
    found = audited(systems, nested)
    rows = [leak.variant for leak in found.leaks if leak.attack == "without_part"]
    assert rows == ["guard 'target_detector'", "guard 'target_detector'"]


@pytest.mark.parametrize(("name", "headline"), PRINTED.items())
def test_the_command_prints_it(
    systems: Systems, name: str, headline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {}
    for role, one in (("it", name), ("before", "untouched"), ("reference", "retrained")):
        lm = getattr(systems, one)
        assert isinstance(lm, LM)
        folders[role] = str(tmp_path / role)
        lm.save(tmp_path / role)
    for split in ("forget", "retain", "holdout"):
        write_records(getattr(REQUEST, split), tmp_path / f"{split}.jsonl")
    words = ["audit", folders["it"], "--before", folders["before"], "--reference",
             folders["reference"], "--out", str(tmp_path / "run")]  # fmt: skip
    for split in ("forget", "retain", "holdout"):
        words += [f"--{split}", str(tmp_path / f"{split}.jsonl")]
    for kind, specs in (("metrics", METRICS), ("attacks", ATTACKS)):
        for spec in specs:
            words += [f"--{kind}", spec if isinstance(spec, str) else json.dumps(spec)]
    code = main(words)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert headline in " ".join(said.out.split())
    assert EXPECTED[name] in headline
    assert "removed" not in said.out
    assert "What is left of the rest" in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What is left of the rest" in page
    assert "95 %:" in page
