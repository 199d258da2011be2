"""Attacks from the inside through a whole audit: rows, curves by layer, numbers, and the page."""

from __future__ import annotations

from typing import Any

import pytest
from nine_systems import REQUEST, ROWS, Systems

from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.report.page import ReportData, render

METRICS: list[Any] = ["answer_probability", {"name": "outcome", "max_new_tokens": 20}]
ATTACKS = ["patching", "lens", "cka", "fisher", "logit_lens_choice", "probe"]


@pytest.fixture(autouse=True)
def cache(audit_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", audit_cache)


def audited(system: Any, systems: Systems, **options: Any) -> AuditResult:
    options = {"reference": systems.retrained, "attacks": ATTACKS, **options}
    return audit(
        system, REQUEST, before=systems.untouched, metrics=METRICS, rows=ROWS,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(systems: Systems, audit_cache: str) -> AuditResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", audit_cache)
        return audited(systems.refusing, systems)


def test_a_refusing_model_still_holds_the_facts_inside(found: AuditResult) -> None:
    (row,) = [leak for leak in found.leaks if leak.attack == "patching"]
    assert found.leaks[0].erased["outcome"] == 1.0  # it says nothing
    assert row.erased["inside"] is not None
    assert row.erased["inside"] < 0.5
    assert row.knowledge["inside"]["original"] == pytest.approx(1)
    assert row.knowledge["inside"]["reference"] == pytest.approx(0)
    assert row.weighs
    assert row.family == "inside"
    assert found.verdict is not None
    assert found.verdict.label == "suppression"
    assert any("Activation patching" in reason for reason in found.verdict.reasons)


def test_curves_by_layer_have_a_line_for_each_system(found: AuditResult) -> None:
    curves = {(one.attack, one.variant): one for one in found.curves}
    assert {attack for attack, _ in curves} == set(ATTACKS)
    for curve in curves.values():
        assert curve.axis == "layer"
        assert curve.metric == "inside"
        assert curve.steps == [1, 2, 3]
        assert set(curve.values) == {"unlearned", "original", "reference"}
    for name in ("patching", "lens", "cka", "fisher"):
        curve = curves[name, ""]
        for role, end in (("original", 1.0), ("reference", 0.0)):
            known = [one for one in curve.values[role] if one is not None]  # type: ignore[index]
            assert known == pytest.approx([end] * len(known), abs=1e-3)
        assert any(one is not None and 0.02 < one < 0.98 for one in curve.values["unlearned"])


def test_what_has_no_score_for_a_record_gives_numbers_and_no_e(found: AuditResult) -> None:
    for name in ("cka", "fisher"):
        (row,) = [leak for leak in found.leaks if leak.attack == name]
        assert not row.erased
        assert not row.weighs
        numbers = row.numbers["like_the_reference"]
        assert numbers["original"] == pytest.approx(0, abs=1e-3)
        assert numbers["reference"] == pytest.approx(1, abs=1e-3)
        assert 0 < numbers["unlearned"] < 1  # type: ignore[operator]
    for name in ("lens", "logit_lens_choice", "probe"):
        rows = [leak for leak in found.leaks if leak.attack == name]
        assert all(not row.weighs and "inside" in row.knowledge for row in rows)
    assert [row.control for row in found.leaks if row.attack == "probe"] == [False, True]


def test_what_looking_took_is_told(found: AuditResult) -> None:
    rows = {leak.attack: leak for leak in found.leaks if leak.attack in ATTACKS}
    assert all(row.cost_tokens > 0 for row in rows.values()), rows
    assert rows["fisher"].cost_steps == rows["fisher"].cost_queries > 0


def test_the_page_shows_the_layers(found: AuditResult) -> None:
    text = render(ReportData(title="T", audit=found))
    assert "What is inside" in text
    assert text.count('id="layers-') == 2 * len(found.curves)
    assert "Like the reference" in text


def test_without_a_reference_comparing_is_skipped_with_the_reason(systems: Systems) -> None:
    names = ["patching", "probe", "logit_lens_choice"]
    result = audited(systems.refusing, systems, reference=None, attacks=names)
    (row,) = [leak for leak in result.leaks if leak.attack == "patching"]
    assert row.note is not None
    assert "--reference" in row.note
    assert not row.erased
    assert any("Activation patching" in line for line in result.not_tested)
    for name in names[1:]:
        row = next(leak for leak in result.leaks if leak.attack == name)
        assert row.note is None or "not run" not in row.note
        assert set(row.knowledge["inside"]) == {"unlearned", "original"}


def test_what_was_seen_is_kept_for_the_next_audit(
    systems: Systems, found: AuditResult, caplog: pytest.LogCaptureFixture
) -> None:
    again = audited(systems.refusing, systems, attacks=["patching"])
    assert any("known from an earlier audit" in line for line in caplog.messages)
    first, second = (
        next(leak for leak in one.leaks if leak.attack == "patching") for one in (found, again)
    )
    assert second.knowledge == first.knowledge
    assert second.cost_tokens == first.cost_tokens
    assert [one for one in again.curves if one.attack == "patching"] == [
        one for one in found.curves if one.attack == "patching"
    ]
