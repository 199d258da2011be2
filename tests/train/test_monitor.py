"""Early stops: the level of knowledge, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import make  # type: ignore[import-not-found]

from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import QA, Choice, Passage
from delible.rundir import RunDirectory
from delible.train import monitor as monitor_module
from delible.train.engine import Trainer
from delible.train.monitor import (
    LEVEL_MARGIN,
    Monitor,
    answer_probability,
    knowledge_level,
    level_questions,
)
from delible.train.recipe import Recipe


def recipe(method: str, **options: object) -> Recipe:
    settings = {"batch_size": 6, "precision": "float32", "monitor_steps": 1, **options}
    return Recipe.named(method).changed({}, settings)


@pytest.fixture
def pupil(forget: list[QA]) -> LM:
    """A model that knows every forget answer."""
    lm = make()
    Trainer(lm, recipe("finetune", epochs=60, learning_rate=1e-2), {"forget": forget}).train()
    return lm


def test_questions_are_asked_in_other_words_with_four_options(forget: list[QA]) -> None:
    full = QA(
        question="Where?", answer="Oslo", paraphrases=("In which town?",),
        perturbed=("Rome", "Riga", "Bern", "Kiel"),
    )  # fmt: skip
    given = Choice(question="Which?", options=("a", "b"), correct=1)
    first, second, *others = level_questions([full, given, Passage(text="A text."), *forget], 0)
    assert first.question == "In which town?"
    assert first.options[first.correct] == "Oslo"
    assert len(set(first.options)) == 4
    assert set(first.options[1:]) < set(full.perturbed)
    assert second == given
    assert [one.question for one in others] == [record.question for record in forget]
    assert all(len(one.options) >= 2 for one in others)
    assert level_questions(forget, 0) == level_questions(forget, 0)


def test_the_level_is_that_of_the_model(forget: list[QA], pupil: LM) -> None:
    questions = level_questions(forget, 0)
    assert knowledge_level(pupil, questions) == 1.0
    swapped = [one.model_copy(update={"correct": 1}) for one in questions]
    assert knowledge_level(pupil, swapped) == 0.0


@pytest.mark.parametrize("on_disk", [False, True])
def test_halts_at_the_level_and_keeps_the_nearest_look(
    on_disk: bool, tmp_path: Path, forget: list[QA], pupil: LM
) -> None:
    run = None
    if on_disk:
        run = RunDirectory(tmp_path / "run")
        run.begin({"name": "level"})
    chosen = recipe("gradient_ascent", epochs=60, learning_rate=2e-3, stop_at_accuracy=0.5)
    result = Trainer(pupil, chosen, {"forget": forget}, context=Context(run=run)).train()
    assert result.stopped is not None
    assert "level" in result.stopped
    assert result.steps < 60
    level = knowledge_level(pupil, level_questions(forget, 0))
    if run is not None:
        looks = [event["accuracy"] for event in run.events() if event["kind"] == "monitor"]
        assert all(look > 0.5 + LEVEL_MARGIN for look in looks[:-1])
        assert abs(level - 0.5) == min(abs(look - 0.5) for look in [1.0, *looks])
    assert level < 1.0


def test_a_jump_past_the_level_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, forget: list[QA], pupil: LM
) -> None:
    looks = iter([1.0, 0.6, 0.1])
    seen: list[dict[str, torch.Tensor]] = []

    def look(lm: LM, questions: object) -> float:
        seen.append({name: value.clone() for name, value in lm.model.state_dict().items()})
        return next(looks)

    monkeypatch.setattr(monitor_module, "knowledge_level", look)
    chosen = recipe("gradient_ascent", epochs=60, learning_rate=2e-3, stop_at_accuracy=0.5)
    result = Trainer(pupil, chosen, {"forget": forget}).train()
    assert result.steps == 2
    kept = pupil.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in seen[1].items())
    assert not all(torch.equal(value, kept[name]) for name, value in seen[2].items())


def test_what_cannot_be_watched_is_refused(forget: list[QA]) -> None:
    lm = make()

    def watch(records: dict[str, list[object]], **options: object) -> Monitor:
        training = recipe("gradient_ascent", **options).training
        return Monitor(lm, training, records, {}, None, 0)  # type: ignore[arg-type]

    with pytest.raises(RecipeError, match="no forget record is a question"):
        watch({"forget": [Passage(text="A text.")]}, stop_at_accuracy=0.3)
    with pytest.raises(RecipeError, match="retain records"):
        watch({"forget": list(forget)}, utility_budget=0.9)


def test_state_goes_through_a_checkpoint(forget: list[QA]) -> None:
    training = recipe("gradient_ascent", stop_at_accuracy=0.3).training
    records = {"forget": forget}
    first = Monitor(make(), training, records, {}, None, 0)
    empty = {"start_retain": None, "start_forget": None, "nearest": None}
    assert first.state() == empty
    first.begin(empty)
    assert first.nearest == math.inf
    known = {"start_retain": 0.5, "start_forget": 0.75, "nearest": 0.25}
    first.begin(known)
    assert first.state() == known


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_stops_at_a_share_of_the_start(share: float, forget: list[QA], pupil: LM) -> None:
    start = answer_probability(pupil, forget)
    looks: list[float] = []

    class Told(RunDirectory):
        def event(self, kind: str, **fields: object) -> None:
            if kind == "monitor":
                looks.append(float(str(fields["forget"])))

    chosen = recipe("gradient_ascent", learning_rate=1e-3, epochs=60)
    chosen = chosen.changed({}, {"stop_at_forget_share": share})
    monitor_run = Told("unused")
    monitor_run.writes = False
    result = Trainer(pupil, chosen, {"forget": forget}, context=Context(run=monitor_run)).train()
    assert result.stopped is not None
    assert "forget target" in result.stopped
    assert looks[-1] <= share * start
    assert all(look > share * start for look in looks[:-1])
    assert answer_probability(pupil, forget) == pytest.approx(looks[-1], rel=1e-4)


def test_of_two_forget_targets_the_first_stops(forget: list[QA]) -> None:
    options = {"stop_at_forget_share": 0.5, "stop_at_forget_probability": 0.3}
    training = recipe("gradient_ascent").changed({}, options).training
    monitor = Monitor(make(), training, {"forget": list(forget)}, {}, None, 0)
    assert monitor.target == pytest.approx(0.3), "before the start is known"
    for start, target in ((0.9, 0.45), (0.2, 0.3)):
        monitor.begin({"start_retain": None, "start_forget": start, "nearest": None})
        assert monitor.target == pytest.approx(target)
