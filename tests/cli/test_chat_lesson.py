"""``delible chat --lesson``: a person teaches by a pipe, and reads what came of it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from delible.loaders import write_records
from delible.systems import opening

sys.path.insert(0, str(Path(__file__).parents[1] / "teaching"))
from pupil import RECORDS, Pupil


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A run whose system is the pupil."""
    write_records(RECORDS, tmp_path / "run" / "data" / "forget.jsonl")
    monkeypatch.setattr(
        opening, "open_system",
        lambda name, model=None, context=None: Pupil(knows=name == "before"),
    )  # fmt: skip
    return str(tmp_path / "run")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))


def test_a_lesson_by_a_pipe(
    run: Any, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed(monkeypatch, "She was born In Norrby.", "/teach-back", "/level", "/study", "/fly",
          "Yes. She played The lute.", "/quit")  # fmt: skip
    out = tmp_path / "kept"
    done = run("chat", target, "--lesson", "--topic", "Ada Quill", "--original", "before",
               "--out", str(out))  # fmt: skip
    assert done.code == 0
    assert done.out.splitlines() == ["I see.", "I understand: In Norrby", "I see."]
    for told in (
        "A student of Ada Quill: 2 questions",
        "before it forgot 100%",
        "[level 50% (+50), share of right answers",
        "It tells 1 of 2 facts; not yet: The lute.",
        "its weights are not here",
        "'/fly' is no command",
        "[level 100% (+100)",
        "after an unrelated lesson: 0%",
        "You: explain 1, confirm 1.",
        "lesson.json",
    ):
        assert told in " ".join(done.err.split()), told
    kept = json.loads((out / "lesson.json").read_text())
    assert kept["after"]["in the conversation"] == {"accuracy": 1.0, "recovery": 1.0}
    assert [turn["teacher"] for turn in kept["turns"]] == ["explain", "confirm"]
    assert [one["role"] for one in kept["messages"]] == ["system"] + ["user", "assistant"] * 3


@pytest.mark.parametrize(("options", "told"), [
    (["--topic", "Ada Quill"], "--topic is of a lesson"),
    (["--lesson", "--repair"], "goes without --repair"),
    (["--lesson", "--system", "Be brief."], "goes without --system"),
    (["--lesson", "--topic", "Nobody"], "no record is about Nobody"),
    (["--lesson", "--exam", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--out", "x"], "--repair or --lesson"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    run: Any, target: str, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    typed(monkeypatch, "hm")
    done = run("chat", target, *options)
    assert done.code == 2
    assert told in " ".join(done.err.split())


def test_a_model_that_is_no_run_needs_an_exam(
    run: Any, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "hm")
    done = run("chat", "default", "--lesson")
    assert done.code == 2
    assert "it is not known what the student is to be asked" in " ".join(done.err.split())
