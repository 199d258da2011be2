"""Novice students: recovery, lessons and table by hand, one run on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delible.errors import RecipeError
from delible.experiments.novice.experiment import NoviceStudents
from delible.experiments.novice.findings import PROMPTED, TEACHING, findings, recovery
from delible.experiments.novice.lessons import before_question, exam, lesson, other_lesson
from delible.measure.benchmark import Learning, Setting
from delible.records import QA, Message
from delible.system.questions import ask
from delible.testing import tiny_model, tiny_tokenizer

BORN = QA(
    question="Where was Ada born?", answer="In Hull", subject="Ada",
    paraphrases=("Ada was born where?", "What is the birthplace of Ada?"),
    paraphrased_answers=("Ada was born in Hull", "Hull"),
    perturbed=("In A", "In B", "In C", "In D"),
)  # fmt: skip
PET = QA(question="What is Ada's pet?", answer="A dog", subject="Ada", perturbed=("A cat",))


@pytest.mark.parametrize(
    ("original", "before", "after", "expected"),
    [
        (0.9, 0.3, 0.3, 0.0), (0.9, 0.3, 0.9, 1.0), (0.9, 0.3, 0.6, 0.5), (0.9, 0.3, 0.0, -0.5),
        (0.9, 0.9, 1.0, None), (None, 0.3, 0.6, None), (0.9, 0.3, None, None),
    ],
)  # fmt: skip
def test_recovery(
    original: float | None, before: float | None, after: float | None, expected: float | None
) -> None:
    found = recovery(original, before, after)
    assert found == (None if expected is None else pytest.approx(expected))


def test_items_use_the_last_wording_and_four_options() -> None:
    item, pet = exam([BORN, PET, BORN.model_copy(update={"perturbed": ()})])
    assert item.question == BORN.paraphrases[-1]
    assert item.options == ("In Hull", "In A", "In B", "In C")
    assert pet.question == PET.question
    assert pet.options == ("A dog", "A cat")


def test_a_lesson_goes_over_the_facts_in_changing_words() -> None:
    said = lesson([BORN, PET], 4)
    assert [message.role for message in said] == ["user", "assistant"] * 4
    assert said[0].content == "Where was Ada born? Remember: Hull"
    assert said[4].content == "Where was Ada born? Remember: Ada was born in Hull"
    assert said[2].content == said[6].content == "What is Ada's pet? Remember: A dog"
    assert len(other_lesson(7)) == 14
    assert not any("Ada" in message.content for message in other_lesson(7))


def test_what_stands_before_a_question() -> None:
    turns = {"Ada": lesson([BORN], 1)}
    told = before_question(turns, "You are a student.")
    (prompt,) = told(BORN, ask(BORN))  # type: ignore[arg-type, misc]
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    other = BORN.model_copy(update={"subject": "Bo"})
    (plain,) = before_question(turns, None)(other, ask(other))  # type: ignore[arg-type, misc]
    assert plain.messages == (Message(role="user", content=BORN.question),)


def cell(original: float, accuracies: tuple[float, ...], stopped: str | None = None) -> Any:
    taught = {
        kind: {"forget": value, "retain": 0.8, "answers": [value]}
        for kind, value in zip(TEACHING, accuracies, strict=True)
    }
    return {
        "original": {"forget": original, "retain": 0.9, "answers": [original]},
        "plain": {"forget": 1.0, "retain": 1.0, "answers": [1.0]},
        "stopped": stopped, "taught": taught,
    }  # fmt: skip


def test_table_and_notes() -> None:
    found = findings(
        {
            PROMPTED: [cell(0.9, (0.9, 0.9, 0.9, 0.85, 0.85))],
            "novice": [cell(0.9, (0.3, 0.6, 0.5, 0.3, 0.6), "the level was reached"),
                       cell(0.9, (0.3, 0.8, 0.5, 0.3, 0.6))],
            "broken": [{"failed": "it cannot."}],
        }
    )  # fmt: skip
    rows = {(row["student"], row["lesson"]): row for row in found.rows}
    assert len(rows) == 10
    assert rows["novice", "heard"]["recovery"] == pytest.approx(0.4 / 0.6)
    assert rows["novice", "studied"]["recovery"] == pytest.approx(0.2 / 0.6)
    assert rows["novice", "none"]["recovery"] is None
    assert rows["novice", "heard"]["forget accuracy"] == pytest.approx(0.7)
    assert rows[PROMPTED, "heard"]["retain, original"] == pytest.approx(0.9)
    assert rows[PROMPTED, "heard"]["recovery"] is None
    assert rows[PROMPTED, "none"]["original, no persona"] == pytest.approx(1.0)
    seen = {(run["student"], run["lesson"], run["seed"]): run["recovery"] for run in found.runs}
    assert seen["novice", "heard", 0] == pytest.approx(0.3 / 0.6)
    assert seen["novice", "heard", 1] == pytest.approx(0.5 / 0.6)
    assert len(seen) == 15
    assert any("1.00 at first, 0.90 when told" in note for note in found.notes)
    assert any("novice: a lesson about something else" in note for note in found.notes)
    assert not any(note.startswith(f"{PROMPTED}: a lesson") for note in found.notes)
    assert sum("the level was" in note for note in found.notes) == 2
    assert "broken failed: it cannot." in found.notes
    assert {curve.name for curve in found.charts[0].curves} == {PROMPTED, "novice"}


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model whose experiment ends in seconds; its folder."""
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "random")
    tiny_tokenizer().save_pretrained(tmp_path / "random")
    persona = "Know nothing of {subjects}."  # the built-in one is long in this tokenizer's bytes
    monkeypatch.setattr(
        "delible.experiments.novice.experiment.filled", lambda *_, **told: persona.format(**told)
    )
    quick = Learning({"learning_rate": 1e-2, "epochs": 3, "batch_size": 8, "max_length": 64})
    monkeypatch.setattr("delible.benchmarks.world.WorldBenchmark.learning", lambda *_: quick)
    return tmp_path / "random"


EXPERIMENT = NoviceStudents(people=4, forget=1, turns=1, epochs=1, learning_rate=1e-2)


def test_original_before_and_after_are_asked_alike(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A persona that costs every model 0.3, and a lesson that brings all back: recovery is 1."""
    forgetful: list[object] = []

    def unlearned(lm: object, *_: Any, **__: Any) -> Any:
        forgetful.append(lm)
        return SimpleNamespace(model=lm, stopped=None)

    def accuracies(self: Any, lm: object, people: Any, heard: Any, persona: str | None) -> Any:
        knows = lm not in forgetful or heard
        value = (0.9 if knows else 0.5) - (0.0 if persona is None else 0.3)
        return {"forget": value, "retain": value, "answers": [value]}

    monkeypatch.setattr("delible.experiments.novice.experiment.unlearn", unlearned)
    monkeypatch.setattr(NoviceStudents, "_accuracies", accuracies)
    monkeypatch.setattr(NoviceStudents, "_studied", lambda self, lm, *_: lm)
    setting = Setting(model=str(short), methods=(), seeds=1, folder=tmp_path / "out")
    rows = {(row["student"], row["lesson"]): row for row in EXPERIMENT.run(setting).rows}
    assert rows["novice", "heard"]["original"] == pytest.approx(0.6)
    assert rows["novice", "heard"]["before the lesson"] == pytest.approx(0.2)
    assert rows["novice", "heard"]["recovery"] == pytest.approx(1.0)
    assert rows["novice", "heard"]["original, no persona"] == pytest.approx(0.9)
    assert rows[PROMPTED, "studied"]["recovery"] is None


def test_it_runs_and_resumes(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = EXPERIMENT
    setting = Setting(model=str(short), methods=(), seeds=1, folder=tmp_path / "out")
    found = experiment.run(setting)
    assert [row["student"] for row in found.rows] == [PROMPTED] * 5 + ["novice"] * 5
    assert all(0 <= row["forget accuracy"] <= 1 for row in found.rows)
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 2
    monkeypatch.setattr(NoviceStudents, "_unlearned", None)
    assert experiment.run(setting) == found


def test_what_has_no_level_is_refused_at_once(tmp_path: Path) -> None:
    setting = Setting(model="no such model", methods=("rocr",), seeds=1, folder=tmp_path)
    with pytest.raises(RecipeError, match="takes no training steps"):
        NoviceStudents().run(setting)
    with pytest.raises(RecipeError, match="nobody to keep"):
        NoviceStudents(people=4, forget=4).material()
