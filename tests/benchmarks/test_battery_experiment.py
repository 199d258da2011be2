"""The battery over methods: its table by hand, and a run on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from delible.errors import RecipeError
from delible.experiments.battery.experiment import Battery
from delible.experiments.battery.findings import findings
from delible.measure.benchmark import Setting
from delible.report.findings import render_findings


def leak(attack: str, family: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {
        "attack": attack, "variant": "", "name": attack.title(), "family": family,
        "erased": {"outcome": value, "answer_probability": 1.0 if value is not None else None},
        "intervals": {"outcome": (0.1, 0.9)}, "knowledge": {}, "numbers": {}, "control": False,
        "weighs": True, "cost_seconds": 1.0, "cost_queries": 3, "cost_steps": 0, "note": None,
        **more,
    }  # fmt: skip


def cell(*leaks: dict[str, Any], verdict: str = "suppression", kept: float = 0.9) -> dict[str, Any]:
    return {
        "verdict": verdict, "reasons": [], "cheapest": "The cheapest.", "leaks": list(leaks),
        "kept": kept, "seconds": 60.0,
    }  # fmt: skip


def test_the_table_by_hand() -> None:
    plain = leak("none", "", 0.9)
    first = cell(
        plain,
        leak("prefix", "prompt", 0.6),
        leak("masking", "prompt", 0.4),
        leak("relearn", "relearning", 0.7),
        leak("trace", "inference", 0.0, weighs=False),
    )
    second = cell(leak("none", "", 0.7), leak("prefix", "prompt", 0.2), kept=0.7,
                  verdict="incomplete")  # fmt: skip
    found = findings({"npo": [first, second], "bad": [{"failed": "it broke"}]})
    (row,) = found.rows
    assert row["asked plainly"] == pytest.approx(0.8)
    assert row["prompt"] == pytest.approx(0.3)  # the lowest of each seed, then the mean
    assert row["relearning"] == pytest.approx(0.7)
    assert row["kept, worst part"] == pytest.approx(0.8)
    assert row["weakest side"] == "Prefix (outcome)"
    assert row["verdict"] == "suppression, incomplete"
    assert "inference" not in row
    assert set(found.shaded) == {"asked plainly", "prompt", "relearning"}
    assert "bad: it broke" in found.notes
    assert len(found.runs) == 7
    trace = next(run for run in found.runs if run["attack"] == "trace")
    assert (trace["weighs"], trace["erased"], trace["low"]) == (False, 0.0, 0.1)
    page = render_findings(Battery(), found, {"model": "tiny", "methods": [], "seeds": 2})
    assert 'class="number e1"' in page  # 0.3 of a family
    assert 'class="number e3"' in page  # 0.8 asked plainly


def test_what_has_no_power_is_no_number() -> None:
    (row,) = findings({"npo": [cell(leak("none", "", None), leak("relearn", "relearning", None))]}
                      ).rows  # fmt: skip
    assert row["asked plainly"] is None
    assert row["relearning"] is None
    assert row["weakest side"] is None


def test_somebody_must_be_kept() -> None:
    with pytest.raises(RecipeError, match="nobody to keep"):
        Battery(people=6, forget=3).split()


@pytest.mark.slow
def test_a_guard_and_the_reference_on_a_tiny_model(tmp_path: Path) -> None:
    setting = Setting("tiny", ["target_detector"], 1, tmp_path)
    battery = Battery(people=8, forget=2, depth="quick", rows=10)
    found = battery.run(setting)
    guard, reference = found.rows
    assert guard["method"] == "target_detector"
    assert guard["verdict"] == "suppression"
    assert guard["part taken away"] == pytest.approx(0.0, abs=0.05)
    assert reference["asked plainly"] == pytest.approx(1.0)
    assert reference["verdict"] in ("removal-consistent", "undetermined")
    assert (tmp_path / "audits" / "target_detector-0" / "metrics.json").is_file()
    again = battery.run(setting)
    assert again.rows == found.rows


# ---- the page of results


def test_the_page_says_for_which_methods_a_claim_shows() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
    try:
        import battery as script
    finally:
        sys.path.pop(0)

    def quantized(value: float | None, variant: str = "4 bit") -> dict[str, Any]:
        return leak("quantize", "quantization", value, variant=variant)

    table = findings(
        {
            "npo": [cell(leak("none", "", 0.9), quantized(0.4))],
            "idk": [cell(leak("none", "", 0.9), quantized(0.88))],
            "rmu": [cell(leak("none", "", 0.9), quantized(None))],
        }
    )
    found = {
        "model": "tiny", "command": "delible bench battery", "seconds": 60.0, "rows": table.rows,
        "runs": table.runs, "notes": table.notes, "git_revision": "abc",
        "hardware": {"processors": 2, "machine": "x86_64", "threads": 1, "accelerator": None,
                     "precision": "float32"},
        "experiment": {"people": 20, "forget": 4, "depth": "quick"},
    }  # fmt: skip
    page = script.page(found)
    said = "shows for npo (0.90 → 0.40); does not show for idk (0.90 → 0.88); has no power for rmu."
    assert said in page
    assert "| quantize: 4 bit | 0.40 | 0.88 | – |" in page
    assert "is used again** (arXiv:2407.00106): not run." in page


def test_the_published_page_is_that_of_its_numbers() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
    try:
        import battery as script
    finally:
        sys.path.pop(0)
    numbers = Path(__file__).parents[2] / "docs" / "results" / "battery.json"
    found = json.loads(numbers.read_text("utf-8"))
    assert numbers.with_suffix(".md").read_text("utf-8") == script.page(found)
