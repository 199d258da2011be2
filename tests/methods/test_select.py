"""Which forget rows are used."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.slots import Context


def make_context(rows: int, seed: int = 0) -> tuple[Context, list[str]]:
    said: list[str] = []
    nothing = cast(Any, None)
    filled = {"forget": cast(Any, [None] * rows), "retain": []}
    context = Context(nothing, filled, {}, nothing, nothing, None, seed, said.append)
    return context, said


@pytest.mark.parametrize(("rows", "share", "count"), [(100, 0.05, 5), (7, 0.01, 1), (40, 0.5, 20)])
def test_the_share_is_drawn_without_replacement(rows: int, share: float, count: int) -> None:
    context, said = make_context(rows)
    chosen = build("select", {"name": "random_coreset", "share": share}).choose(context)
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < rows
    assert f"{count} of {rows} forget rows" in said[0]
    assert f"{rows / count:.3g} times the epochs" in said[0]


def test_the_draw_belongs_to_the_seed_and_reaches_every_row() -> None:
    select = build("select", {"name": "random_coreset", "share": 0.25})
    drawn = [select.choose(make_context(20, seed)[0]) for seed in range(60)]
    assert drawn[0] == select.choose(make_context(20, 0)[0])
    assert len({tuple(chosen) for chosen in drawn}) > 50
    assert {index for chosen in drawn for index in chosen} == set(range(20))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="share"):
        build("select", {"name": "random_coreset", "share": 0.0})


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
