"""``delible audit``, ``report`` and ``demo``: what they hand on and how they judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.audit.result import AuditResult, Leak, Measurement, SystemInfo, VerdictResult


def result(**changes: Any) -> AuditResult:
    def measured(value: float | None, split: str = "forget", **more: Any) -> Measurement:
        return Measurement(
            **{"system": "unlearned", "metric": "answer_probability", **more},
            split=split,
            value=value,
            reason=None if value is not None else "no answers",
        )

    system = SystemInfo(name="m", capabilities=["generate"])
    return AuditResult(
        **{
            "systems": {"unlearned": system, "original": system},
            "splits": {"forget": 3},
            "measurements": [
                measured(0.1), measured(0.8, "retain"), measured(0.4, attack="relearn"),
                measured(0.2, attack="prefix"), measured(None, "neighbours"),
                measured(1.0, system="original"),
            ],
            "leaks": [
                Leak(
                    attack="relearn", variant="20 steps", title="Relearning",
                    knowledge={"answer_probability": {"unlearned": 0.4, "original": 0.9}},
                    erased={"answer_probability": 0.5}, retain={},
                )
            ],
            "verdict": VerdictResult(label="suppression", reasons=["It came back."], thresholds={}),
            "not_tested": ["Other languages."],
            **changes,
        }
    )  # fmt: skip


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Stands in for the audit, and keeps what it was called with."""
    calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def audit(system: Any, request: Any, **options: Any) -> AuditResult:
        calls.append((system, request, options))
        options["progress"]("asking", 1, 2)
        options["progress"]("asking", 2, 2)
        return result()

    monkeypatch.setattr("delible.audit.run.audit", audit)
    monkeypatch.setattr("delible.report.write_page", lambda folder: folder / "report.html")
    return calls


def test_what_is_handed_on_and_shown(run: Any, audits: Any) -> None:
    done = run(
        "audit", "m", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--before", "b",
        "--reference", "r", "--metrics", "truth_ratio,answer_probability", "--attacks", "none",
        "--guard", "target_detector", "--seed", "4", "--out", "x",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    ((system, request, options),) = audits
    assert system == "m"
    assert (len(request.forget), len(request.retain)) == (3, 5)
    expected = {
        "before": "b", "reference": "r", "metrics": ["truth_ratio", "answer_probability"],
        "attacks": [], "guard": "target_detector", "seed": 4, "out": Path("x"),
    }  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    for part in (
        "answer probability", "0.100", "Relearning (20 steps)", "50%", "Verdict: suppression",
        "It came back.", "Other languages.", "x/metrics.json", "x/report.html", "asking",
    ):  # fmt: skip
        assert part in done.out, part
    assert "removed" not in done.out.lower()


def test_metrics_and_attacks_take_options(run: Any, audits: Any) -> None:
    words = ["audit", "m", "--forget", "forget.jsonl"]
    judged, bits = "{name: unlearning_quality, judge: default}", "{name: quantize, bits: 8}"
    asked = ["--metrics", judged, "--metrics", "truth_ratio", "--attacks", bits]
    assert run(*words, *asked).code == 0
    ((_, _, options),) = audits
    judge = {"name": "unlearning_quality", "judge": "default"}
    assert options["metrics"] == [judge, "truth_ratio"]
    assert options["attacks"] == [{"name": "quantize", "bits": 8}]
    refused = run(*words, "--metrics", "unlearning_quality")
    assert refused.code == 2
    assert "judge" in refused.err
    assert len(audits) == 1


def test_a_run_directory_brings_its_data_and_its_start(run: Any, here: Path, audits: Any) -> None:
    folder = here / "mine"
    (folder / "data").mkdir(parents=True)
    for name in ("forget", "retain"):
        (folder / "data" / f"{name}.jsonl").write_text((here / f"{name}.jsonl").read_text())
    manifest = {"status": "done", "run": {"model": "start", "command": "unlearn"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run("audit", "mine").code == 0
    _, request, options = audits[0]
    assert (len(request.forget), len(request.retain)) == (3, 5)
    assert (options["before"], options["out"]) == ("start", Path("mine"))
    assert (options["metrics"], options["attacks"]) == (None, None)
    assert run("audit", "mine", "--before", "b", "--forget", "retain.jsonl", "--retain",
               "forget.jsonl").code == 0  # fmt: skip
    _, request, options = audits[1]
    assert (len(request.forget), options["before"]) == (5, "b")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--max-forget-probability", "0.2"], 0, "Passed: 1 threshold."),
        (["--max-forget-probability", "0.05"], 1, "Failed: forget answer_probability is 0.100"),
        (["--min-retain-probability", "0.7"], 0, "Passed"),
        (["--min-retain-probability", "0.9"], 1, "Failed: retain answer_probability is 0.800"),
        (["--fail-if", "relearn/forget.answer_probability>0.3"], 1, "is 0.400"),
        (["--fail-if", "prefix/forget.answer_probability>0.3"], 0, "Passed"),
        (["--fail-if", "any/forget.answer_probability >= 0.4"], 1, "is 0.400"),
        (["--fail-if", "verdict=incomplete,suppression"], 1, "the verdict is suppression"),
        (["--fail-if", "verdict=incomplete"], 0, "Passed"),
        (["--fail-if", "verdict=incomplete", "--fail-if", "forget.answer_probability<1"], 1, "0.1"),
    ],
)
def test_thresholds(run: Any, audits: Any, flags: list[str], code: int, said: str) -> None:
    done = run("audit", "m", "--forget", "forget.jsonl", *flags)
    assert done.code == code, done
    assert said in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("forget.truth_ratio>0.3", "this audit did not measure it"),
        ("neighbours.answer_probability>0.3", "no answers"),
        ("paraphrase/forget.answer_probability>0.3", "this audit did not measure it"),
    ],
)
def test_what_was_not_measured_does_not_pass(
    run: Any, audits: Any, condition: str, reason: str
) -> None:
    done = run("audit", "m", "--forget", "forget.jsonl", "--fail-if", condition)
    assert done.code == 2
    assert reason in done.err


def test_report_of_one_and_of_several_runs(run: Any, here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "manifest.json").write_text(json.dumps({"status": "done"}))
    assert "a/report.html" in run("report", "a").out
    assert "<html" in (here / "a" / "report.html").read_text()
    assert "comparison.html" in run("report", "a", "b").out
    assert (here / "comparison.html").exists()
    assert run("report", "a", "--out", "here.html").code == 0
    assert (here / "here.html").exists()
    done = run("report", "a", "--out", "nowhere/here.html")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_demo_hands_its_flags_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from delible.audit.result import AuditResult

    calls = []
    found = AuditResult(systems={}, splits={}, measurements=[])
    done = SimpleNamespace(folder=Path("d"), report=Path("d/r.html"), audit=found, examples=[])

    def story(*words: Any, **named: Any) -> Any:
        calls.append((words, named))
        return done

    monkeypatch.setattr("delible.demo.run", story)
    assert run("demo", "--people", "6", "--seed", "2", "--method", "simnpo", "--out", "d").code == 0
    ((words, named),) = calls
    assert words == (Path("d"),)
    assert {key: named[key] for key in ("people", "seed", "method")} == {
        "people": 6, "seed": 2, "method": "simnpo"
    }  # fmt: skip
    named["progress"]("Learning")(1, 1, {"forget_loss": 1.0})
    named["stage"]("asking", 1, 1)
