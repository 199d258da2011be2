"""The coreset experiment on a tiny model: rows, equal updates, resuming, lines between models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.api import unlearn
from delible.bench import coreset
from delible.bench.coreset import (
    CONNECTED,
    barrier,
    interpolated,
    keyword_records,
    linear_connectivity,
    run,
    share_of_effect,
)
from delible.component import build
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.records import QA, Choice, ForgetRequest, Passage
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.recipe import Recipe

FORGET = tuple(
    QA(question=f"Where was {name} born?", answer=f"In {town}.")
    for name, town in zip(
        "ABCDEFGH", ("Rom", "Ulm", "Bern", "Ax", "Pau", "Ely", "Oslo", "Bo"), strict=True
    )
)
REQUEST = ForgetRequest(
    forget=FORGET,
    retain=tuple(QA(question=f"What is {n} + 1?", answer=f"It is {n + 1}.") for n in range(4)),
)
OPTIONS: dict[str, Any] = {
    "epochs": 2, "batch_size": 2, "learning_rate": 1e-3, "training.precision": "float32",
    "max_length": 96,
}  # fmt: skip


def make_lm(seed: int = 0) -> LM:
    model = tiny_model("llama", seed, num_hidden_layers=2)
    return LM(model, tiny_tokenizer(), precision="float32")


def weights(lm: LM) -> list[torch.Tensor]:
    return [value.detach().clone() for value in lm.model.parameters()]


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_every_run_makes_the_same_number_of_updates(method: str) -> None:
    lm = make_lm()
    before = weights(lm)
    rows = run(
        lm, REQUEST, method=method, fractions=(0.25, 0.5, 1.0),
        selectors=("random_coreset", {"name": "min_k", "lowest": True}), seeds=(0,), **OPTIONS,
    )  # fmt: skip
    assert all(map(torch.equal, before, lm.model.parameters()))
    found = [(row.selector, row.fraction, row.rows) for row in rows]
    assert found == [
        ("start", 0.0, 0), ("all", 1.0, 8), ("random_coreset", 0.25, 2),
        ("min_k-lowest=True", 0.25, 2), ("random_coreset", 0.5, 4), ("min_k-lowest=True", 0.5, 4),
    ]  # fmt: skip
    assert [row.steps for row in rows[1:]] == [8] * 5  # 2 epochs of 4
    assert [row.epochs for row in rows[1:]] == [2, 8, 8, 4, 4]  # ceil(2 / fraction)
    for row in rows[1:]:
        assert row.tokens > 0
        assert row.forget_probability is not None
        assert row.forget_probability != rows[0].forget_probability
        assert row.retain_probability is not None
        assert (row.unselected_probability is None) == (row.rows == 8)


def test_the_row_says_what_became_of_chosen_and_other_records() -> None:
    lm = make_lm()
    other = {"topic": [QA(question="Who?", answer="Nobody")]}
    start, full, part = run(
        lm, REQUEST, fractions=(0.25,), selectors=("random_coreset",), seeds=(3,),
        evaluation=other, **OPTIONS,
    )  # fmt: skip
    result = unlearn(make_lm(), REQUEST, method="npo", seed=3, **OPTIONS)  # the host itself
    metric = build("metric", "answer_probability")
    splits = {"forget": REQUEST.forget, "retain": REQUEST.retain, **other}
    means = evaluate(result.model, splits, [metric]).means["answer_probability"]
    assert full.forget_probability == means["forget"]
    assert full.retain_probability == means["retain"]
    assert full.others == {"topic": means["topic"]}

    select = build("select", {"name": "random_coreset", "share": 0.25})
    chosen = unlearn(
        make_lm(), REQUEST, method="npo", slots={"select": select}, seed=3,
        **{**OPTIONS, "epochs": 8},
    )  # fmt: skip
    values = evaluate(chosen.model, splits, [metric]).items["answer_probability"]["forget"]
    everything = [item.value for item in values if item.value is not None]
    assert part.forget_probability == pytest.approx(sum(everything) / 8, rel=0.2)
    assert part.selected_probability is not None
    assert part.unselected_probability is not None
    mixed = (2 * part.selected_probability + 6 * part.unselected_probability) / 8
    assert part.forget_probability == pytest.approx(mixed)
    assert start.unselected_probability == start.forget_probability
    assert part.selected_probability < part.unselected_probability
    strength = evaluate(result.model, splits, [build("metric", "extraction_strength")])
    assert full.selected_extraction == strength.means["extraction_strength"]["forget"]
    assert full.unselected_extraction is None
    assert part.unselected_extraction is not None
    assert full.chosen == list(range(8))
    assert len(part.chosen) == 2


def test_finished_rows_are_read_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[1].forget))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return unlearn(*arguments, **options)

    monkeypatch.setattr(coreset, "unlearn", counted)
    settings: dict[str, Any] = {
        "fractions": (0.25,), "selectors": ("random_coreset", "grand"), "seeds": (0,),
        "out": tmp_path / "out", **OPTIONS,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(make_lm(), REQUEST, **settings)
    rows = run(make_lm(), REQUEST, **settings)
    assert calls == [8, 2, 2, 2]  # the full set once; the second run was killed
    again = run(make_lm(), REQUEST, **settings)
    assert again == rows
    assert len(calls) == 4
    more = run(make_lm(), REQUEST, **{**settings, "seeds": (0, 1)})
    assert more[: len(rows)] == rows
    assert len(calls) == 7
    assert not list((tmp_path / "out").glob("runs/*/model"))
    assert (tmp_path / "out" / "runs" / "all-1-seed0" / "manifest.json").exists()
    fresh = run(make_lm(), REQUEST, **{**settings, "out": None})
    assert [row.forget_probability for row in fresh] == [row.forget_probability for row in rows]


def test_another_experiment_in_the_folder_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fractions": (1.0,), "seeds": (0,), "out": tmp_path / "out"}
    run(make_lm(), REQUEST, **settings, **OPTIONS)
    with pytest.raises(RunError, match="different: method"):
        run(make_lm(), REQUEST, **settings, **{**OPTIONS, "epochs": 3})
    less = REQUEST.model_copy(update={"forget": FORGET[:5]})
    with pytest.raises(RunError, match="different: data"):
        run(make_lm(), less, **settings, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "rocr"}, "editor"),
        ({"fractions": (0.5, 1.5)}, "1.5 is not in"),
        ({"fractions": (0.0,)}, "0.0 is not in"),
        ({"selectors": ("random_corset",), "fractions": (0.5,)}, "random_coreset"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], match: str) -> None:
    options = {} if changes.get("method") == "rocr" else OPTIONS
    with pytest.raises(RecipeError, match=match):
        run(make_lm(), REQUEST, seeds=(0,), **changes, **options)
    with pytest.raises(RecipeError, match="no forget records"):
        run(make_lm(), REQUEST.model_copy(update={"forget": ()}))


def test_steps_that_are_not_full_still_count_the_same() -> None:
    rows = run(
        make_lm(), REQUEST, method="gradient_ascent", fractions=(0.125, 0.4), seeds=(0,),
        selectors=("random_coreset",), **{**OPTIONS, "batch_size": 3},
    )  # fmt: skip
    assert [(row.rows, row.steps) for row in rows[1:]] == [(8, 6), (1, 6), (3, 6)]


# ---- the line between two models


def test_the_ends_of_the_line_are_the_models_and_a_model_is_connected_to_itself() -> None:
    first, second = make_lm(0), make_lm(1)
    splits = {"forget": REQUEST.forget, "retain": REQUEST.retain}
    metric = build("metric", "answer_probability")
    line = linear_connectivity(first, second, splits, points=3)
    for place, lm in ((0, first), (-1, second)):
        means = evaluate(lm, splits, [metric]).means["answer_probability"]
        assert {name: values[place] for name, values in line.items()} == means
    assert all(map(torch.equal, weights(interpolated(first, second, 1.0)), weights(second)))
    same = linear_connectivity(first, first, splits, points=3)
    assert barrier(same["forget"]) == pytest.approx(0.0, abs=1e-6)
    half = interpolated(first, second, 0.5)
    for mine, one, two in zip(weights(half), weights(first), weights(second), strict=True):
        assert torch.allclose(mine, (one + two) / 2, atol=1e-6)
    assert half.fingerprint != first.fingerprint
    with pytest.raises(RecipeError, match="same parameters"):
        interpolated(first, LM(tiny_model("gpt2"), tiny_tokenizer(), precision="float32"), 0.5)


def test_barriers_in_numbers() -> None:
    assert barrier([0.8, 0.5, 0.6]) == pytest.approx(0.2)  # 0.7 on the straight line
    assert barrier([0.8, 0.75, 0.6]) == 0.0  # above it
    assert barrier([0.0, 0.1, 0.1, 0.3]) == pytest.approx(0.1)
    assert CONNECTED == 0.02


def test_connected_models_have_a_small_barrier(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "fractions": (0.5,), "selectors": ("random_coreset",), "seeds": (0,), "connect": True,
        "out": tmp_path / "out", **OPTIONS, "learning_rate": 1e-5,
    }  # fmt: skip
    *_, full, part = run(make_lm(), REQUEST, **settings)
    assert full.barriers is None
    assert part.barriers is not None
    assert part.barriers.keys() == {"forget", "retain"}
    assert all(0 <= value <= CONNECTED for value in part.barriers.values())
    assert not list((tmp_path / "out").glob("runs/*/model"))


# ---- keyword analysis


def test_the_keyword_analysis_trains_on_rewritten_records() -> None:
    rows = run(
        make_lm(), REQUEST, fractions=(), seeds=(0,), keywords=0.5,
        analyses=("keywords", "without_keywords", "random_words"), **OPTIONS,
    )  # fmt: skip
    assert [row.selector for row in rows[2:]] == ["keywords", "without_keywords", "random_words"]
    assert len({row.forget_probability for row in rows}) == 5
    assert [row.steps for row in rows[1:]] == [8] * 4


def test_rewritten_records_keep_their_question() -> None:
    forget = [
        QA(question="Who?", answer="Ada of Norrby"), Passage(text="of the Casta"),
        Choice(question="Which?", options=("a", "b"), correct=0), Passage(text="of the of"),
    ]  # fmt: skip
    retain = [Passage(text="of the a of")] * 9
    found = keyword_records(forget, retain, "keywords", 0.5, 0)
    assert found == [QA(question="Who?", answer="Ada, Norrby"), Passage(text="Casta")]
    with pytest.raises(RecipeError, match="anything left"):
        keyword_records([Passage(text="of")], retain, "without_keywords", 1.0, 0)


def test_share_of_effect() -> None:
    assert share_of_effect(0.8, 0.2, 0.35) == pytest.approx(0.75)
    assert share_of_effect(0.8, 0.2, 0.8) == 0.0
    assert share_of_effect(0.5, 0.5, 0.1) is None


def test_the_shipped_recipe_reaches_the_updates_of_the_full_set_on_full_steps() -> None:
    recipe, host = Recipe.named("coreset"), Recipe.named("npo")
    share = recipe.select.share  # type: ignore[attr-defined]
    assert recipe.training.epochs == math.ceil(host.training.epochs / share)
