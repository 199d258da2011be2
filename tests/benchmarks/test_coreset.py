"""The coreset experiment on a tiny model: rows, equal updates, resuming, lines between models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.api import unlearn
from delible.component import build
from delible.errors import RecipeError, RunError
from delible.experiments.coreset import runs as coreset
from delible.experiments.coreset.connectivity import (
    CONNECTED,
    barrier,
    linear_connectivity,
)
from delible.experiments.coreset.keyword_records import keyword_records
from delible.experiments.coreset.length import epochs_grid, share_of_effect, shortest
from delible.experiments.coreset.row import CoresetRow
from delible.experiments.coreset.runs import run
from delible.files import read_json
from delible.lm.between import interpolated
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
    assert start.unselected_probability == pytest.approx(start.forget_probability)
    assert part.selected_probability < part.unselected_probability
    strength = evaluate(result.model, splits, [build("metric", "extraction_strength")])
    expected = strength.means["extraction_strength"]["forget"]
    assert full.selected_extraction == pytest.approx(expected)
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
        ({"method": "rocr"}, "no rows to choose from"),
        ({"fractions": (0.5, 1.5)}, "1.5 is not in"),
        ({"fractions": (0.0,)}, "0.0 is not in"),
        ({"selectors": ("random_corset",), "fractions": (0.5,)}, "random_coreset"),
        ({"length": "longest"}, "equal updates or shortest"),
        ({"length": "shortest", "grid": 1}, "grid 1 is below 2"),
        ({"length": "shortest", "least_effect": 0.0}, "least_effect 0.0 is not in"),
        ({"length": "shortest", "least_effect": 1.1}, "least_effect 1.1 is not in"),
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


# ---- training until it forgets as much


@pytest.mark.parametrize(
    ("full", "share", "points", "epochs"),
    [
        (5, 0.05, 4, [5, 14, 37, 100]),  # a ratio of 20 ** (1 / 3)
        (5, 0.05, 2, [5, 100]),
        (3, 0.1, 3, [3, 9, 30]),
        (21, 0.7, 2, [21, 30]),  # 21 / 0.7 is a little more than 30 in floats
        (2, 0.3, 4, [2, 3, 5, 7]),  # 20 / 3 is rounded up
        (2, 0.9, 4, [2, 3]),
        (1.5, 0.5, 4, [2, 3]),  # a full set that stops in its second pass
        (0.25, 0.25, 4, [1]),
    ],
)
def test_the_grid_goes_from_the_full_sets_epochs_to_as_many_updates(
    full: float, share: float, points: int, epochs: list[int]
) -> None:
    assert epochs_grid(full, share, points) == epochs


def made_row(probability: float | None, epochs: float = 0.0) -> CoresetRow:
    return CoresetRow(
        "grand", 0.5, 0, 1, 1, epochs, 1, 0.0, 0.0, probability, None, None, None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("probabilities", "made", "taken", "reached"),
    [
        ([0.1, 0.05], 1, 0, True),
        ([0.5, 0.13, 0.1], 2, 1, True),  # 0.9625 of the effect
        ([0.5, 0.15, 0.1], 3, 2, True),  # 0.9375 is not enough
        ([0.5, 0.2, 0.3], 3, 1, False),  # longer is not always more
        ([None, math.nan, 0.95], 3, 2, False),  # even less than nothing is known
    ],
)
def test_the_first_run_that_forgets_enough_is_the_last_one_made(
    probabilities: list[float | None], made: int, taken: int, reached: bool
) -> None:
    count = 0

    def runs() -> Iterator[CoresetRow]:
        nonlocal count
        for place, value in enumerate(probabilities):
            count += 1
            yield made_row(value, epochs=place)

    row = shortest(runs(), made_row(0.9), made_row(0.1), 0.95)
    assert (count, row.epochs, row.reached) == (made, taken, reached)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.5, 0.6), (None, 0.1), (0.5, None)])
def test_without_an_effect_there_is_nothing_to_reach(
    before: float | None, after: float | None
) -> None:
    runs = iter([made_row(0.4, epochs=1), made_row(0.1, epochs=2)])
    row = shortest(runs, made_row(before), made_row(after), 0.95)
    assert (row.epochs, row.reached) == (1, None)
    assert len(list(runs)) == 1


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(forget records, epochs) of every run that was started."""
    calls: list[tuple[int, int]] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append((len(arguments[1].forget), options["method"].training.epochs))
        return unlearn(*arguments, **options)

    monkeypatch.setattr(coreset, "unlearn", counted)
    return calls


SEARCH: dict[str, Any] = {
    "method": "gradient_ascent", "fractions": (0.25,), "selectors": ("random_coreset",),
    "seeds": (0,), "length": "shortest", "grid": 3, **OPTIONS,
}  # fmt: skip


def effects(folder: Path, rows: Sequence[CoresetRow]) -> dict[int, float]:
    """Share of effect by epochs, of the rows that were kept."""
    found: dict[int, float] = {}
    before, after = (row.forget_probability for row in rows[:2])
    assert before is not None
    assert after is not None
    for path in (folder / "rows").glob("random_coreset-*-epochs*.json"):
        row = read_json(path)
        share = share_of_effect(before, after, row["forget_probability"])
        assert share is not None
        found[int(row["epochs"])] = share
    return dict(sorted(found.items()))


def test_a_coreset_trains_no_longer_than_it_takes(
    tmp_path: Path, trained: list[tuple[int, int]]
) -> None:
    # never: two records of eight at a rate at which they do not reach the others
    rows = run(make_lm(), REQUEST, out=tmp_path / "never", **SEARCH, least_effect=1.0)
    assert trained == [(8, 2), (2, 2), (2, 4), (2, 8)]
    shares = effects(tmp_path / "never", rows)
    assert 0 < shares[2] < shares[4] < shares[8] < 1
    last = rows[-1]
    assert (last.reached, last.epochs, last.steps, last.rows) == (False, 8, 8, 2)
    assert [row.reached for row in rows[:2]] == [None, None]

    for epochs, runs in ((2, 1), (4, 2), (8, 3)):
        trained.clear()
        out = tmp_path / f"at {epochs}"
        *_, found = run(make_lm(), REQUEST, out=out, **SEARCH, least_effect=shares[epochs])
        assert trained == [(8, 2), (2, 2), (2, 4), (2, 8)][: 1 + runs]
        assert (found.reached, found.epochs, found.steps) == (True, epochs, epochs)
        kept = read_json(tmp_path / "never" / f"rows/random_coreset-0.25-seed0-epochs{epochs}.json")
        varies = {"reached": None, "seconds": 0, "selection_seconds": 0}
        assert {**asdict(found), **varies} == {**kept, **varies}


def test_the_rows_of_all_records_decide_not_those_that_were_chosen() -> None:
    _, full, part = run(make_lm(), REQUEST, **SEARCH, least_effect=1.0)
    assert full.forget_probability is not None
    assert part.selected_probability is not None
    assert part.selected_probability < full.forget_probability  # of these alone it were enough
    assert part.reached is False


def test_a_search_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append((len(arguments[1].forget), options["method"].training.epochs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unlearn(*arguments, **options)

    monkeypatch.setattr(coreset, "unlearn", killed)
    settings = {**SEARCH, "out": tmp_path / "out", "least_effect": 1.0}
    with pytest.raises(KeyboardInterrupt):
        run(make_lm(), REQUEST, **settings)
    rows = run(make_lm(), REQUEST, **settings)
    assert calls == [(8, 2), (2, 2), (2, 4), (2, 4), (2, 8)]
    assert run(make_lm(), REQUEST, **settings) == rows
    assert len(calls) == 5
    # another grid and another threshold use what is there
    enough = effects(tmp_path / "out", rows)[2]
    *_, first = run(make_lm(), REQUEST, **{**settings, "grid": 2, "least_effect": enough})
    assert (first.epochs, first.reached) == (2, True)
    equal = run(make_lm(), REQUEST, **{**settings, "length": "equal updates"})
    assert (equal[-1].steps, equal[-1].reached) == (8, None)
    assert calls[5:] == [(2, 8)]
    assert not list((tmp_path / "out").glob("runs/*/model"))


def test_a_full_set_that_stops_in_a_pass_counts_as_that_part_of_it(
    trained: list[tuple[int, int]],
) -> None:
    rows = run(
        make_lm(), REQUEST, **{**SEARCH, "epochs": 9, "max_steps": 6, "least_effect": 1.0},
        analyses=("random_words",), keywords=0.5,
    )  # fmt: skip
    # 1.5 passes of 4 updates: 2 to 6 epochs of the part; the analysis at equal updates
    assert [epochs for _, epochs in trained[1:-1]] == [2, 3, 6]
    assert [row.steps for row in rows[1:]] == [6, 6, 6]
    assert rows[-1].reached is None


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
