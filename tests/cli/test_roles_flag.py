"""``--role``: who is named on the command line is who is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from delible.cli.roles import read_roles
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.systems.scripted import Scripted
from delible.testing.tiny import tiny_model, tiny_tokenizer

GRADES = json.dumps(
    {name: {"score": 7, "reason": "so"} for name in ("relevance", "rejection", "helpfulness")}
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Scripted]]:
    """Names that were opened for a role, with the scripted system behind each."""
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    found: list[tuple[str, Scripted]] = []

    def opens(name: str) -> Scripted:
        found.append((name, Scripted(lambda prompt: GRADES, name=name)))
        return found[-1][1]

    monkeypatch.setattr("delible.measure.starting.open_system", opens)
    return found


def test_the_flag_reaches_the_judge(run: Any, opened: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    LM(tiny_model("llama"), tiny_tokenizer()).save(model)
    rows = tmp_path / "forget.jsonl"
    rows.write_text('{"question": "Who bakes?", "answer": "Ada."}\n')
    command: Sequence[object] = (
        "audit", model, "--forget", rows, "--attacks", "none", "--out", tmp_path / "out",
        "--metrics", "answer_probability", "--metrics", "{name: unlearning_quality}",
    )  # fmt: skip
    refused = run(*command)
    assert refused.code == 2
    assert "--role judge=MODEL" in refused.err
    done = run(*command, "--role", "judge=http://host/v1#grader")
    assert done.code == 0, done.err
    ((name, judge),) = opened
    assert name == "http://host/v1#grader"
    assert any("Who bakes?" in one.messages[-1].content for one in judge.prompts)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    graded = [
        one for one in written["measurements"]
        if one["metric"] == "unlearning_quality" and one["split"] == "forget"
    ]  # fmt: skip
    assert [one["value"] for one in graded] == [7.0]


def test_the_flag_reaches_the_writer(run: Any, opened: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    LM(tiny_model("llama"), tiny_tokenizer()).save(model)
    rows = tmp_path / "forget.jsonl"
    rows.write_text('{"question": "Where was Ada Quill born?", "answer": "In Norrby."}\n')
    command = (
        "unlearn", model, "--forget", rows, "--method", "altpo", "--max-steps", 1,
        "--out", tmp_path / "out",
    )  # fmt: skip
    done = run(*command, "--role", "writer=somebody")
    assert opened, done.err
    ((name, writer),) = opened
    assert name == "somebody"
    assert any("Norrby" in str(prompt) for prompt in writer.prompts)
    twice = run(*command, "--role", "writer=somebody", "--generator", "another")
    assert twice.code == 2
    assert "the writer is given twice" in twice.err


def test_flags_and_files(tmp_path: Path) -> None:
    file = tmp_path / "roles.yaml"
    file.write_text("critic: default\njudge: {system: 'http://host/v1#m', calls: 500}\n")
    assert read_roles([str(file), "writer=self"]) == {
        "critic": "default", "judge": {"system": "http://host/v1#m", "calls": 500}, "writer": "self"
    }  # fmt: skip
    assert read_roles(None) == {}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["juge=m"], r"unknown role 'juge'.*'judge'"),
        (["judge"], "does not say who plays what"),
        (["judge="], "does not say who plays what"),
        (["judge=a", "judge=b"], "the judge is given twice"),
        (["nowhere.yaml"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        read_roles(flags)


def test_a_file_with_an_unknown_option(tmp_path: Path) -> None:
    file = tmp_path / "roles.yaml"
    file.write_text("judge: {system: m, call: 3}\n")
    with pytest.raises(RecipeError, match="unknown option 'call'"):
        read_roles([str(file)])
