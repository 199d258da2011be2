"""Presets: a recipe with the numbers of its paper, wherever a method is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make

from delible import registry
from delible.bench.run import method_names
from delible.errors import RecipeError
from delible.records import QA
from delible.resolving import recipe_named, resolve_method
from delible.train.engine import Trainer
from delible.train.recipe import Recipe, Training, presets_of, read_yaml

PUBLISHED = [
    (name, preset)
    for name, path in registry.recipe_files().items()
    for preset in presets_of(read_yaml(path), name)
]


@pytest.mark.parametrize(("name", "preset"), PUBLISHED)
def test_presets_are_whole_recipes_with_the_same_objective(name: str, preset: str) -> None:
    ours, theirs = Recipe.named(name), Recipe.named(f"{name}@{preset}")
    assert theirs.name == f"{name}@{preset}"
    assert Recipe.from_mapping(theirs.spec()) == theirs
    assert theirs.objective.card == ours.objective.card
    if theirs.training.optimizer == "sgd":  # the balance says how long steps are
        return
    limit = 5e-4 if "rank" in theirs.place.spec() else 1e-4  # adapters take more
    assert theirs.training.learning_rate <= limit, "a schedule for models of billions of weights"


def test_every_recipe_has_a_paper_preset_unless_nothing_is_published() -> None:
    without = {name for name in registry.recipe_files() if (name, "paper") not in PUBLISHED}
    assert without == {
        "catnip", "coreset", "finetune", "harmonizing", "ilu", "lau_ga", "novice", "random_mapping",
        "simnpo_sam", "tru", "u2a", "unlikelihood",
    }  # fmt: skip


def test_npo_and_its_rivals_have_the_schedule_of_their_code() -> None:
    # licong-lin/negative-preference-optimization: 32 rows, ten epochs, the first of them to warm up
    for name in ("npo", "npo_kl", "dpo", "kto", "graddiff", "idk", "gradient_ascent"):
        training = Recipe.named(f"{name}@paper").training
        assert training == Training(
            learning_rate=1e-5, epochs=10, batch_size=32, schedule="linear", warmup_share=0.1,
            weight_decay=0.01,
        )  # fmt: skip
    assert Recipe.named("npo@paper").objective.spec() == {"name": "npo", "beta": 0.1}


def test_what_the_papers_weigh_and_where_they_differ_from_the_defaults() -> None:
    def of(name: str, slot: str, option: str) -> Any:
        return getattr(getattr(Recipe.named(f"{name}@paper"), slot), option)

    assert (of("satimp", "objective", "beta1"), of("satimp", "objective", "beta2")) == (5.0, 0.1)
    assert of("satimp", "balance", "retain_weight") == 0.1
    assert (of("wtnpo", "objective", "beta"), of("wtnpo", "objective", "a")) == (4.0, 1.5)
    assert (of("rmu", "objective", "adaptive"), of("rmu", "objective", "steering")) == (None, 6.5)
    assert (of("rmu", "training", "max_steps"), of("rmu", "training", "batch_size")) == (150, 4)
    assert (of("lau_npo", "harden", "epsilon"), of("lau_npo", "harden", "radius")) == (
        8.0, "absolute",
    )  # fmt: skip
    assert of("wagle", "training", "weight_decay") == 0.1
    assert of("task_vector", "finish", "scale") == 5.0


FILE = """
objective: {name: npo, beta: 0.3}
keep: nll
training: {learning_rate: 1.0e-3, epochs: 3, stop_at_forget_probability: 0.2}
tune: {beta: [0.1, 1]}
presets:
  paper: {about: a test, objective: npo, training: {learning_rate: 1.0e-5}}
  longer: {training: {epochs: 9}}
"""


def test_a_preset_takes_the_place_of_whole_slots(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    found = recipe_named(f"{path}@paper", "it has no presets")
    assert found.name == "mine@paper"
    assert found.training == Training(learning_rate=1e-5), "nothing of the defaults is left"
    assert found.objective.spec() == {"name": "npo", "beta": 0.1}
    assert found.keep.card.name == "nll"
    assert not found.tune
    assert recipe_named(str(path), "it is none") == Recipe.from_file(path)
    assert Recipe.from_file(f"{path}@longer").tune
    changed = recipe_named(
        resolve_method("npo@paper", options={"beta": 0.2}, strength="gentle"), "it has no beta"
    )
    assert changed.training.learning_rate == pytest.approx(0.5e-5)
    assert changed.objective.spec()["beta"] == 0.2


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("npo@papr", r"no preset 'papr'.*Did you mean 'paper'"),
        ("novice@paper", r"no preset 'paper'.*It has none"),
        ("npoo@paper", r"unknown method 'npoo'.*Did you mean 'npo'"),
        ("rocr@paper", r"is no recipe: it has no presets.*Say 'rocr' alone"),
        ("target_detector@paper", "is no recipe: it has no presets"),
    ],
)
def test_a_preset_that_is_not_there_is_refused_wherever_methods_are_named(
    method: str, reason: str
) -> None:
    for named in (resolve_method, lambda name: method_names([name])):
        with pytest.raises(RecipeError, match=reason):
            named(method)


def test_benchmarks_take_presets_as_methods_of_their_own() -> None:
    asked = ["npo", "npo@paper", "none", "npo@paper", "rocr"]
    assert method_names(asked) == ["npo", "npo@paper", "rocr"]


@pytest.mark.parametrize(
    ("preset", "reason"),
    [("{objectve: npo}", r"unknown key 'objectve'.*objective"), ("[1]", "is a mapping")],
)
def test_presets_of_another_form_are_refused(tmp_path: Path, preset: str, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"objective: npo\npresets: {{paper: {preset}}}\n")
    with pytest.raises(RecipeError, match=reason):
        resolve_method(str(path))


def test_a_paper_schedule_warms_up_and_falls(forget: list[QA], retain: list[QA]) -> None:
    recipe = Recipe.named("npo@paper").changed(
        {}, {"batch_size": 2, "precision": "float32", "learning_rate": 1e-3}
    )
    history = Trainer(make(), recipe, {"forget": forget, "retain": retain}).train().history
    # 6 rows in pairs: 3 steps in each of 10 epochs, the first of which warms up
    rising = [1 / 3, 2 / 3, 1.0]
    falling = [left / 27 for left in range(27, 0, -1)]
    factors = [numbers["learning_rate"] / 1e-3 for numbers in history]
    assert factors == pytest.approx([*rising, *falling])


def test_one_kind_of_warm_up_at_a_time() -> None:
    assert [Training(warmup_share=0.1).warmup(total) for total in (10, 125, 4)] == [1, 12, 0]
    assert Training(warmup_steps=20).warmup(1000) == 20
    with pytest.raises(RecipeError, match="not both"):
        Training.build("training", warmup_steps=3, warmup_share=0.1)
