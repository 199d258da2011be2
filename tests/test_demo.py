"""The demo's numbers: a table per model, and attacks that exist."""

from __future__ import annotations

import pytest

from delible import demo
from delible.component import build
from delible.measure.attack import ModelAttack, PromptAttack
from delible.resolving import resolve_method
from delible.train.recipe import Recipe


@pytest.mark.parametrize("model", ["default", "tiny"])
def test_the_numbers_fit_the_recipes(model: str) -> None:
    learning = Recipe.named("finetune").changed({}, demo.of(demo.LEARNING, model))
    assert learning.training.learning_rate == demo.LEARNING[model]["learning_rate"]
    options = dict(demo.of(demo.UNLEARNING, model))
    strength = options.pop("strength", None)
    unlearning = resolve_method("npo", options=options, strength=strength)
    assert all(
        unlearning.spec()["training"].get(key, value) == value for key, value in options.items()
    )
    attacks = [build("attack", spec) for spec in demo.attacks(model)]
    assert all(isinstance(attack, PromptAttack | ModelAttack) for attack in attacks)
    rates = [spec["learning_rate"] for spec in demo.attacks(model) if "learning_rate" in spec]
    assert rates == [demo.RELEARNING[model]["full"], demo.RELEARNING[model]["lora"]]


def test_other_models_learn_like_the_default() -> None:
    assert demo.of(demo.LEARNING, "some/model") is demo.LEARNING["default"]
    assert demo.attacks("some/model") == demo.attacks("default")
    assert demo.of(demo.LEARNING, "tiny") != demo.LEARNING["default"]
