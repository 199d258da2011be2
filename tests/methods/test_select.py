"""Which forget rows are used."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.plan import make_plan
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext


def make_context(rows: int, seed: int = 0) -> SlotContext:
    nothing = cast(Any, None)
    filled = {"forget": cast(Any, [None] * rows), "retain": []}
    return SlotContext(nothing, filled, {}, nothing, nothing, None, seed)


@pytest.mark.parametrize(("rows", "share", "count"), [(100, 0.05, 5), (7, 0.01, 1), (40, 0.5, 20)])
def test_the_share_is_drawn_without_replacement(
    caplog: pytest.LogCaptureFixture, rows: int, share: float, count: int
) -> None:
    context = make_context(rows)
    chosen = build("select", {"name": "random_coreset", "share": share}).choose(context)
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < rows
    assert f"{count} of {rows} forget rows" in caplog.messages[0]
    assert f"{rows / count:.3g} times the epochs" in caplog.messages[0]


def test_the_draw_belongs_to_the_seed_and_reaches_every_row() -> None:
    select = build("select", {"name": "random_coreset", "share": 0.25})
    drawn = [select.choose(make_context(20, seed)) for seed in range(60)]
    assert drawn[0] == select.choose(make_context(20, 0))
    assert len({tuple(chosen) for chosen in drawn}) > 50
    assert {index for chosen in drawn for index in chosen} == set(range(20))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="share"):
        build("select", {"name": "random_coreset", "share": 0.0})


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.25, 0.1, 0.05])
def test_the_number_of_updates_stays_when_epochs_make_up_for_the_share(share: float) -> None:
    rows, batch, epochs = 40, 2, 4
    chosen = build("select", {"name": "random_coreset", "share": share}).choose(make_context(rows))
    recipe = Recipe.from_mapping(
        {
            "objective": "gradient_ascent",
            "training": {"batch_size": batch, "epochs": math.ceil(epochs / share)},
        }
    )
    kept = cast(Any, [None] * len(chosen))
    steps = make_plan(recipe, kept, [], seed=0).steps
    whole = epochs * rows // batch
    # the epochs are rounded up: at most the steps of one more epoch over the rows that are left
    assert whole <= len(steps) <= whole + math.ceil(len(chosen) / batch)
    assert sum(map(len, steps)) == len(chosen) * math.ceil(epochs / share)  # no row is dropped


def test_a_share_of_one_is_the_full_run_bit_by_bit() -> None:
    forget = [QA(question=f"Who is {name}?", answer=f"{name} it is.") for name in "ABCDE"]
    results = []
    for select in ("all", {"name": "random_coreset", "share": 1.0}):
        lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
        recipe = Recipe.from_mapping(
            {
                "objective": "gradient_ascent", "select": select,
                "training": {"epochs": 1, "batch_size": 2, "max_length": 64},
            }
        )  # fmt: skip
        Trainer(lm, recipe, {"forget": forget}).train()
        results.append([value.detach() for value in lm.model.parameters()])
    assert all(map(torch.equal, *results))
