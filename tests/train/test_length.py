"""How long and how fast a recipe trains: rows, width, the dial, and what a user says instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_runs import make  # type: ignore[import-not-found]

from delible import registry
from delible.lm.lm import LM
from delible.records import QA
from delible.train.engine import Trainer
from delible.train.plan import make_plan
from delible.train.recipe import Recipe, Training
from delible.train.row import Row


def planned(rows: int, **training: Any) -> int:
    recipe = Recipe.named("gradient_ascent").model_copy(update={"training": Training(**training)})
    return len(make_plan(recipe, cast(list[Row], [None] * rows), [], 0).steps)


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [
        (10, {"epochs": 3, "batch_size": 16}, 3),
        (10, {"epochs": 3, "batch_size": 16, "least_steps": 40}, 40),
        (10, {"epochs": 3, "batch_size": 4, "least_steps": 40}, 42),  # whole epochs of 3 steps
        (400, {"epochs": 3, "batch_size": 16, "least_steps": 40}, 75),
        (10, {"epochs": 3, "batch_size": 16, "least_steps": 40, "max_steps": 5}, 5),
        (0, {"epochs": 3, "least_steps": 40}, 0),
    ],
)
def test_few_rows_are_passed_more_often(rows: int, training: dict[str, Any], steps: int) -> None:
    assert planned(rows, **training) == steps


def test_passes_that_end_before_the_steps_that_are_allowed_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        assert planned(10, epochs=3, batch_size=16, max_steps=3) == 3
        assert not caplog.messages
        assert planned(10, epochs=3, batch_size=16, max_steps=60) == 3
    (told,) = caplog.messages
    assert "3 passes over 10 forget rows are 3 steps, fewer than the 60" in told


@pytest.mark.parametrize(
    ("meant", "width", "rate"),
    [(576, 576, 2e-5), (576, 288, 4e-5), (576, 4608, 2.5e-6), (None, 8, 2e-5)],
)
def test_the_rate_follows_the_width(meant: int | None, width: int, rate: float) -> None:
    training = Training(learning_rate=2e-5, learning_rate_width=meant).fitted(width)
    assert training.learning_rate == pytest.approx(rate)
    assert training.learning_rate_width is None
    assert Training(learning_rate=0.5, learning_rate_width=100).fitted(10).learning_rate == 1.0


def test_an_engine_trains_at_the_rate_of_its_model(forget: list[QA]) -> None:
    lm = make()
    chosen = Recipe.named("gradient_ascent").changed({}, {"max_steps": 1})
    result = Trainer(lm, chosen, {"forget": forget}).train()
    meant = chosen.training
    assert meant.learning_rate_width is not None
    wanted = meant.learning_rate * meant.learning_rate_width / lm.anatomy.hidden_size
    assert result.history[0]["learning_rate"] == pytest.approx(wanted)


def test_what_is_said_is_meant() -> None:
    own = Recipe.named("npo").training
    assert own.learning_rate_width
    assert own.least_steps
    assert own.stop_at_forget_share
    rate = Recipe.named("npo").changed({}, {"learning_rate": 3e-5}).training
    assert (rate.learning_rate, rate.learning_rate_width) == (3e-5, None)
    assert (rate.least_steps, rate.stop_at_forget_share) == (
        own.least_steps, own.stop_at_forget_share,
    )  # fmt: skip
    for length in ({"epochs": 3}, {"training.max_steps": 3}):
        said = Recipe.named("npo").changed({}, length).training
        assert (said.least_steps, said.stop_at_forget_share) == (None, None)
        assert said.learning_rate_width == own.learning_rate_width
    both = {"epochs": 3, "stop_at_forget_share": 0.2}
    for options in (both, dict(reversed(both.items()))):
        assert Recipe.named("npo").changed({}, options).training.stop_at_forget_share == 0.2


def test_the_dial_goes_one_way_for_every_recipe() -> None:
    for card in registry.cards("recipe"):
        recipe = Recipe.named(card.name)
        gentle, normal, strong = (
            recipe.with_strength(strength).training for strength in ("gentle", "normal", "strong")
        )
        assert normal == recipe.training, card.name
        if normal.stop_at_forget_share is not None:
            shares = [one.stop_at_forget_share for one in (gentle, normal, strong)]
            assert shares == sorted(shares, reverse=True), card.name
            assert len(set(shares)) == 3, card.name
            assert strong.least_steps == 2 * cast(int, normal.least_steps), card.name
        else:
            rates = [one.learning_rate for one in (gentle, normal, strong)]
            assert rates == sorted(set(rates)), card.name
            assert gentle.epochs <= normal.epochs <= strong.epochs, card.name


def test_every_method_for_forgetting_has_enough_steps_for_few_rows() -> None:
    for card in registry.cards("recipe"):
        training = Recipe.named(card.name).training
        if card.name == "finetune":
            continue
        if training.optimizer == "adamw":
            assert training.learning_rate_width == 576, card.name
        assert (training.least_steps or 0) >= 10, card.name


def test_the_model_decides_the_width() -> None:
    lm = cast(LM, SimpleNamespace(anatomy=SimpleNamespace(hidden_size=288)))
    recipe = Recipe.named("npo")
    assert recipe.fitted(lm).training.learning_rate == pytest.approx(
        2 * recipe.training.learning_rate
    )
    assert recipe.fitted(lm).objective == recipe.objective
