"""What takes long beside the steps is told: gradients for masks, reference values, rows."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import make  # type: ignore[import-not-found]

from delible import watching
from delible.context import Context
from delible.preparing import automatic_retain
from delible.records import QA
from delible.train.activations import input_norms, mean_states
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.rows import make_rows

FORGET = [QA(question=f"Where is {name}?", answer=f"In {name}ville.") for name in "ABC"]
RETAIN = [QA(question=f"What is {name}?", answer=f"A letter, {name}.") for name in "XYZW"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SECONDS_UNTOLD", 0.0)


def test_masks_and_reference_values_are_told() -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def stage(title: str, done: int, total: int) -> None:
        told.setdefault(title, []).append((done, total))

    recipe = Recipe.named("npo").changed({"place": "wagle"}, {"training.max_steps": 1})
    Trainer(
        make(), recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(stage=stage)
    ).train()
    assert told["gradients of 3 rows"][:3] == [(1, 3), (2, 3), (3, 3)]
    assert told["reference values of 3 rows"][-1] == (3, 3)
    for calls in told.values():
        assert all(0 < done <= total for done, total in calls)


@pytest.mark.parametrize(
    ("ask", "title"),
    [
        ("losses", "losses of 3 rows"),
        ("total", "gradients of 3 rows"),
        ("norms", "gradient norms of 3 rows"),
    ],
)
def test_each_question_about_gradients_is_told_to_its_end(ask: str, title: str) -> None:
    told: list[tuple[str, int, int]] = []
    lm = make()
    gradients = Gradients(lm, stage=lambda *what: told.append(what))
    getattr(gradients, ask)(make_rows(lm.template, FORGET))
    assert told[-1] == (title, 3, 3)


@pytest.mark.parametrize(
    ("ask", "title"),
    [(input_norms, "inputs of the layers of 3 rows"), (mean_states, "hidden states of 3 rows")],
)
def test_each_question_about_activations_is_told_to_its_end(ask: Any, title: str) -> None:
    told: list[tuple[str, int, int]] = []
    lm = make()
    ask(lm, make_rows(lm.template, FORGET), lambda *what: told.append(what))
    assert told[-1] == (title, 3, 3)


def test_an_automatic_retain_set_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    automatic_retain(make(), 4, lambda *what: told.append(what))
    assert told[-1] == ("automatic retain set", 4, 4)
