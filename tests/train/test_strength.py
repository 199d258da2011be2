"""The one dial: gentle, normal and strong go further and further, for every recipe.

What is left of a taught model's knowledge is measured in ``tests/test_achieved.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import make

from delible import registry
from delible.records import QA
from delible.train.plan import make_plan
from delible.train.recipe import Recipe, Strength, presets_of, read_yaml
from delible.train.rows import make_rows

STRENGTHS: tuple[Strength, ...] = ("gentle", "normal", "strong")
NAMES = sorted(registry.recipe_files())
PRESETS = [
    f"{name}@{preset}"
    for name, path in registry.recipe_files().items()
    for preset in presets_of(read_yaml(path), name)
]
#: What is kept is linked to what is forgotten, as some ways of pairing rows need it.
ROWS = [
    QA(question=f"Town of person {n}?", answer=f"It is {n}.", subject="A", neighbour_of="A")
    for n in range(40)
]


def rows(count: int) -> list[Any]:
    return make_rows(make().template, ROWS[:count])


@pytest.fixture(scope="module", params=[3, 40], ids="few {}".format)
def planned(request: pytest.FixtureRequest) -> tuple[list[Any], list[Any]]:
    """Forget and retain rows: so few that the least number of steps counts, and many."""
    return rows(request.param), rows(10)


@pytest.mark.parametrize("name", [*NAMES, *PRESETS])
def test_the_dial_goes_further_in_every_recipe(
    name: str, planned: tuple[list[Any], list[Any]]
) -> None:
    recipe = Recipe.named(name)
    turned = [recipe.with_strength(strength) for strength in STRENGTHS]
    steps = [len(make_plan(one, *planned, seed=0).steps) for one in turned]
    rates = [one.training.learning_rate for one in turned]
    stops = [one.training.stop_at_forget_share for one in turned]
    assert turned[1] == recipe, "normal is the recipe as it is"
    assert steps == sorted(steps)
    assert rates == sorted(rates)
    if recipe.training.stop_at_forget_share is None:
        # how far: the way that weights can go, which Adam walks at the learning rate
        ways = [count * rate for count, rate in zip(steps, rates, strict=True)]
        assert ways[0] < 0.75 * ways[1]
        assert ways[2] > 1.25 * ways[1]
        assert stops == [None] * 3
    else:
        assert 1 > stops[0] > stops[1] > stops[2] > 0  # type: ignore[operator]
        assert steps[2] > steps[1], "who stops later needs more time"
    # nothing else moves: neither what is learned nor how
    slots = [{**one.spec(), "training": None} for one in turned]
    assert slots[0] == slots[1] == slots[2]
