"""Path dependence: the theorem in numbers, curves by hand, and both experiments on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from delible.api import unlearn
from delible.bench import stages
from delible.bench.prepare import learned
from delible.bench.stages import (
    apart,
    at,
    curve_distance,
    first_crossing,
    forgetting,
    kl,
    learned_in_stages,
    mean,
    scores_of,
    spaced,
    spread,
    token_means,
    token_sums,
    trajectory,
)
from delible.errors import RecipeError, RunError
from delible.experiments.path.depth import PathDepth, depth, turning
from delible.experiments.path.depth import findings as depth_findings
from delible.experiments.path.experiment import PathDependence
from delible.experiments.path.findings import findings, linear_theorem, path_numbers
from delible.experiments.path.linear import (
    Example,
    ascent,
    distance,
    divergence,
    growth,
    learned_in_order,
    ridge_stage,
)
from delible.experiments.path.rows import (
    OPENING,
    STAGES,
    last_number,
    order_of,
    sums,
)
from delible.lm.lm import LM
from delible.measure.benchmark import Findings, Setting
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.testing import tiny_model, tiny_tokenizer
from delible.watching import shown

# ---- the theorem


def test_ridge_regression_held_to_where_it_was() -> None:
    # one feature: (x'x + mu) theta = x'y + mu before
    found = ridge_stage(np.array([[1.0], [2.0]]), np.array([3.0, 4.0]), np.array([5.0]), 2.0)
    assert found == pytest.approx([(11 + 10) / 7])
    weak = ridge_stage(np.array([[1.0, 0.0]]), np.array([7.0]), np.array([1.0, 2.0]), 1e-9)
    assert weak == pytest.approx([7, 2])


def test_one_step_of_ascent() -> None:
    # error 1 * 2 - 1 = 1; up by rate * 2/k * x * error
    found = ascent(np.array([2.0]), np.array([[1.0], [0.0]]), np.array([1.0, 9.0]), 0.1, 1)
    assert found == pytest.approx([2 + 0.1 * 2 / 2 * 1])


@pytest.mark.parametrize("seed", range(5))
def test_the_difference_grows_by_the_same_factor_whatever_the_targets(seed: int) -> None:
    example = Example.drawn(seed)
    one, two = example.histories(1.0)
    features, targets = example.forget
    factor = np.eye(features.shape[1]) + growth(features, 0.05)
    for steps in (1, 7, 30):
        expected = np.linalg.matrix_power(factor, steps) @ (one - two)
        for shift in (0.0, 3.0):
            first = ascent(one, features, targets + shift, 0.05, steps)
            second = ascent(two, features, targets + shift, 0.05, steps)
            np.testing.assert_allclose(first - second, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_grows_exponentially_in_the_end(seed: int) -> None:
    example = Example.drawn(seed)
    one, two = example.histories(1.0)
    known = divergence(one - two, example.forget[0], example.tests, 0.05)
    assert known is not None
    largest = float(np.linalg.eigvalsh(growth(example.forget[0], 0.05))[-1])
    logs = np.log(example.curve(1.0, 0.05, 300))
    assert logs[300] - logs[299] == pytest.approx(2 * math.log1p(largest), rel=1e-3)
    assert largest >= known.rate > 0


def test_the_bound_holds_on_a_hundred_examples() -> None:
    checked = 0
    for seed in range(100):
        example = Example.drawn(seed)
        one, two = example.histories(0.5 + seed % 7)
        rate = 0.01 * (1 + seed % 5)
        known = divergence(one - two, example.forget[0], example.tests, rate)
        assert known is not None
        curve = example.curve(0.5 + seed % 7, rate, 60)
        for step in range(known.holds_from, 61):
            assert curve[step] >= known.bound(step)
            checked += 1
    assert checked > 1000


def test_one_of_two_histories_leaves_the_retrained_model() -> None:
    example = Example.drawn(1)
    one, two = example.histories(1.0)
    known = divergence(one - two, example.forget[0], example.tests, 0.05)
    assert known is not None
    retrained = learned_in_order((example.first, (example.second[0][4:], example.second[1][4:])), 1)
    for tolerance in (0.1, 10.0, 1000.0):
        steps = known.steps_to_leave(tolerance)
        gone = [ascent(theta, *example.forget, 0.05, steps) for theta in (one, two)]
        assert max(distance(theta, retrained, example.tests) for theta in gone) > tolerance
    assert known.steps_to_leave(1000.0) > known.steps_to_leave(0.1)


def test_equal_stages_have_no_paths() -> None:
    stage = Example.drawn(0).first
    example = Example(stage, stage, Example.drawn(0).forget, Example.drawn(0).tests)
    one, two = example.histories(1.0)
    assert np.array_equal(one, two)
    assert example.curve(1.0, 0.05, 10) == [0.0] * 11
    assert divergence(one - two, example.forget[0], example.tests, 0.05) is None


def test_the_chart_of_the_theorem() -> None:
    chart, note = linear_theorem()
    measured, bound = (dict(curve.points) for curve in chart.curves)
    assert all(measured[step] >= value for step, value in bound.items())
    assert len(bound) > 10
    assert "grows from" in note


# ---- numbers by hand


def test_divergences() -> None:
    half, skew = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.9, 0.1]]))
    there = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl(half, skew) == pytest.approx(there)
    assert apart(half, skew) == pytest.approx((there + back) / 2)
    assert kl(half, half) == 0.0
    assert kl(np.concatenate([half, half]), np.concatenate([half, skew])) == pytest.approx(
        there / 2
    )
    with np.errstate(divide="ignore"):
        sure = np.log(np.array([[1.0, 0.0]]))
    assert kl(sure, half) == pytest.approx(math.log(2))
    assert kl(half, sure) is None  # infinite
    assert kl(half, np.full((1, 2), np.nan)) is None
    assert kl(half, np.concatenate([half, half])) is None


def test_curves() -> None:
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None
    assert spread([1.0, None, 4.0]) == 3.0
    assert spread([1.0, None]) is None
    assert first_crossing([0.0, 1.0, 3.0], 2.0) == 1.5
    assert first_crossing([0.0, None, 3.0], 1.5) == 1.0
    assert first_crossing([0.0, 1.0], 2.0) is None
    assert first_crossing([2.0], 2.0) == 0.0
    assert at([0, 4, 8], 1.25) == 5.0
    assert at([1.0, None], 0.0) == 1.0
    assert at([1.0, None], 0.5) is None
    assert curve_distance([0.0, 1.0, None], [1.0, 4.0, 5.0]) == 2.0


def test_orders_and_records() -> None:
    assert order_of(1) == ("refusals", *STAGES)
    assert order_of(3) == ("style", "people", "refusals", "sums")
    assert order_of(4) == (*STAGES, "refusals")
    records = PathDependence(strangers=10, people=3).records()
    assert len(records["people"]) == 15
    assert len(records["refusals"]) == 35
    assert len(records["unseen"]) == 15
    subjects = {name: {one.subject for one in records[name]} for name in records}
    assert not subjects["refusals"] & (subjects["people"] | subjects["unseen"])
    assert all(one.answer.startswith(OPENING + " ") for one in records["refusals"])
    assert len({one.answer for one in records["refusals"]}) > 4
    assert [one.answer for one in sums(3)] == [f"The result is {n}" for n in (4, 5, 6)]
    assert last_number("12 and 7.") == 7
    assert last_number("none") is None
    assert spaced(sums(9), 3) == [sums(9)[0], sums(9)[12], sums(9)[24]]


def cell(forget: list[float | None], people: list[float | None]) -> dict[str, Any]:
    curves = {
        "refusals opening": forget, "refusals all": forget, "unseen opening": forget,
        "unseen all": forget, "people": people, "retrained": [3.0, 2.0, 1.0],
    }  # fmt: skip
    return {"steps": [0, 2, 4], "curves": curves, "stopped": None, "sums": [0.25, 0.5]}


def test_the_numbers_of_a_path() -> None:
    found = path_numbers(
        {
            "1": cell([-1.0, -3.0, -5.0], [-0.5, -0.6, -0.9]),
            "4": cell([-2.0, -2.5, -4.0], [-1.0, -0.9, -0.7]),
        }
    )
    first, last = found["1"], found["4"]
    assert (first["forget score"], last["forget score"]) == (4.0, 2.0)
    assert (first["slowness (1 = fastest)"], last["slowness (1 = fastest)"]) == (1.0, 2.0)
    # the equal score is 2: reached after 2 steps, and at the end
    assert (first["steps to equal score"], last["steps to equal score"]) == (2.0, 4.0)
    assert first["people utility"] == pytest.approx(0.6)
    assert first["people utility at equal score"] == pytest.approx(0.9)
    assert last["people utility"] == pytest.approx(0.7)  # a rise is a change too
    assert first["sums change"] == 0.25
    assert first["KL to retrained after"] == 1.0
    # forget scores 0, 2, 4 and 0, 0.5, 2
    assert first["distance of curves"] == pytest.approx(3.5 / 3)
    never = path_numbers(
        {"1": cell([-1.0, -3.0, -5.0], [0.0] * 3), "4": cell([-1.0] * 3, [0.0] * 3)}
    )
    assert never["1"]["steps to equal score"] is None
    nothing = path_numbers(
        {"1": cell([-1.0, -3.0, None], [0.0] * 3), "4": cell([-1.0] * 3, [0.0] * 3)}
    )
    assert nothing["1"]["forget score"] is None
    assert nothing["4"]["slowness (1 = fastest)"] is None


def test_every_run_is_there_besides_the_means() -> None:
    seeds = [
        {"seed": seed, "apart": {"1 4": [0.5, 0.7, 2.0 + seed]}, "paths": {
            "1": cell([-1.0, -3.0, -5.0 - seed], [0.0] * 3), "4": cell([-1.0] * 3, [0.0] * 3),
        }}
        for seed in (0, 2)
    ]  # fmt: skip
    found = findings({"npo": seeds}, {})
    runs = {(run["refusals learned"], run["seed"]): run for run in found.runs}
    assert {key: run["forget score"] for key, run in runs.items()} == {
        ("1st", 0): 4.0, ("last", 0): 0.0, ("1st", 2): 6.0, ("last", 2): 0.0,
    }  # fmt: skip
    assert found.rows[0]["forget score"] == 5.0
    assert runs["last", 2]["KL to the other paths before"] == 0.5
    assert runs["last", 2]["KL to the other paths after"] == 4.0


def test_without_a_step_nothing_has_changed() -> None:
    for values in path_numbers({"1": cell([-1.0] * 1, [-2.0]), "2": cell([-3.0], [-1.0])}).values():
        assert values["forget score"] == 0.0
        assert values["people utility"] == 1.0


def test_depths() -> None:
    before: dict[str, list[float | None]] = {"C": [-5.0], "U": [-2.0], "R": [-9.0]}

    def after(c: float, u: float, r: float | None) -> dict[str, list[float | None]]:
        return {"C": [*before["C"], c], "U": [*before["U"], u], "R": [*before["R"], r]}

    assert depth(after(-30.0, -40.0, -10.0)) == "deep"
    assert depth(after(-6.0, -40.0, -10.0)) == "superficial"
    assert depth(after(-4.0, -40.0, -10.0)) == "superficial"
    assert depth(after(-4.0, -8.0, -10.0)) == "none"
    assert depth(after(-4.0, -8.0, None)) is None
    curves = after(-6.0, -40.0, -10.0)
    assert turning([0, 5], curves, "U") == 5
    assert turning([0, 5], curves, "C") is None


# ---- models with a history


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("path")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "random")
    tiny_tokenizer().save_pretrained(folder / "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "random")


FORGET = tuple(QA(question=f"Who is {name}?", answer="A baker.") for name in "ABCD")
REQUEST = ForgetRequest(forget=FORGET)
BUDGET = {"learning_rate": 1e-3, "epochs": 2, "batch_size": 2}


def weights(lm: LM) -> list[torch.Tensor]:
    return [value.detach().clone() for value in lm.model.parameters()]


def test_looking_changes_nothing(model: str) -> None:
    recipe = forgetting("npo", BUDGET, keep=False)
    assert recipe.keep.card.name == "none"
    assert forgetting("npo", BUDGET, keep=True).keep.card.name == "nll"
    asked = scores_of(FORGET)

    def look(lm: LM) -> list[float | None]:
        lm.generate([Prompt.ask("Who?")], Decoding(4, temperature=1.0))
        return token_sums(lm, asked)

    lm = LM.load(model)
    points, stopped = trajectory(lm, REQUEST, recipe, look, every=2, seed=5)
    assert stopped is None
    assert [step for step, _ in points] == [0, 2, 4]
    plain = unlearn(LM.load(model), REQUEST, method=recipe, seed=5, shown=0)
    assert all(map(torch.equal, weights(plain.model), weights(lm)))
    assert points[0][1] == token_sums(LM.load(model), asked)
    assert points[-1][1] == token_sums(plain.model, asked)
    half = recipe.changed({}, {"max_steps": 2})
    middle = unlearn(LM.load(model), REQUEST, method=half, seed=5, shown=0)
    assert points[1][1] == pytest.approx(token_sums(middle.model, asked), abs=1e-5)
    means = token_means(lm, scores_of(FORGET, "A baker."))
    # 8 bytes and the end of turn
    assert means == pytest.approx([(value or math.nan) / 9 for value in points[-1][1]])


def test_a_finisher_is_part_of_the_end(model: str) -> None:
    recipe = forgetting("npo_wa", {**BUDGET, "start": 0.1, "every": 1, "points": 2}, keep=False)
    points, _ = trajectory(
        LM.load(model), REQUEST, recipe, lambda lm: token_sums(lm, scores_of(FORGET)), every=1
    )
    whole = unlearn(LM.load(model), REQUEST, method=recipe, shown=0)
    assert points[-1][1] == token_sums(whole.model, scores_of(FORGET))
    assert [step for step, _ in points] == [0, 1, 2, 3, 4]


def test_editors_have_no_trajectory() -> None:
    with pytest.raises(RecipeError, match="takes no training steps"):
        forgetting("rocr", {}, keep=False)


def test_orders_with_a_common_beginning_share_it(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    original = learned

    def counted(*arguments: Any, **options: Any) -> Path:
        said: list[str] = []
        with shown(said.append):
            result = original(*arguments, **options)
        if not any("from the cache" in text for text in said):
            trained.append(options["title"])
        return result

    monkeypatch.setattr("delible.bench.stages.learned", counted)
    rows = {name: FORGET[place : place + 2] for place, name in enumerate("abc")}
    options = {name: {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3} for name in "abc"}
    first = learned_in_stages(model, rows, "abc", options=options)
    second = learned_in_stages(model, rows, "acb", options=options)
    assert trained == ["a", "b", "c", "c", "b"]
    assert learned_in_stages(model, rows, "", options=options) == model
    apart_now = zip(weights(LM.load(first)), weights(LM.load(second)), strict=True)
    assert not all(torch.equal(one, two) for one, two in apart_now)


# ---- the whole way


def setting(model: str, folder: Path, **changes: Any) -> Setting:
    return Setting(**{"model": model, "methods": (), "seeds": 1, "folder": folder, **changes})


SMALL: dict[str, Any] = {
    "people": 2, "strangers": 4, "steps": 2, "every": 1, "batch_size": 2, "limit": 2,
    "attempts": 1, "learned": 0.1, "learning_rate": 1e-3,
}  # fmt: skip


def test_the_experiment_runs_and_resumes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = PathDependence(positions=(1, 4), **SMALL)
    found = experiment.run(setting(model, tmp_path, methods=("gradient_ascent", "npo")))
    assert isinstance(found, Findings)
    assert [(row["method"], row["refusals learned"]) for row in found.rows] == [
        (method, which)
        for method in ("gradient_ascent", "npo") for which in ("1st", "last", "spread")
    ]  # fmt: skip
    assert len({tuple(row) for row in found.rows}) == 1
    first, last, differing = found.rows[:3]
    assert differing["forget score"] == pytest.approx(
        abs(first["forget score"] - last["forget score"])
    )
    assert {first["slowness (1 = fastest)"], last["slowness (1 = fastest)"]} == {1.0, 2.0}
    between = next(chart for chart in found.charts if chart.title == "Divergence between paths")
    assert [curve.name for curve in between.curves] == ["gradient_ascent", "npo"]
    for curve in between.curves:
        assert [x for x, _ in curve.points] == [0, 1, 2]
        assert all(y > 0 for _, y in curve.points)
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 6
    assert not list((tmp_path / "cells").glob("*.npz"))
    assert sum("slowest in" in note for note in found.notes) == 2
    monkeypatch.setattr(stages, "trajectory", None)  # nothing is trained again
    assert experiment.run(setting(model, tmp_path, methods=("gradient_ascent", "npo"))) == found
    one = json.loads(cells[0].read_text())
    assert one["steps"] == [0, 1, 2]


@pytest.mark.slow
def test_a_method_that_fails_does_not_end_the_others(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stages.trajectory

    def failing(lm: LM, request: ForgetRequest, recipe: Any, *more: Any, **options: Any) -> Any:
        if recipe.name == "npo":
            raise RunError("the loss is no number.")
        return original(lm, request, recipe, *more, **options)

    monkeypatch.setattr(stages, "trajectory", failing)
    experiment = PathDependence(positions=(1, 4), **SMALL)
    found = experiment.run(setting(model, tmp_path, methods=("npo", "gradient_ascent")))
    assert {row["method"] for row in found.rows} == {"gradient_ascent"}
    assert "npo failed: the loss is no number." in found.notes


def test_a_method_of_the_paper_has_its_options_whether_named_or_not(tmp_path: Path) -> None:
    own = PathDependence().recipes(Setting("tiny", (), 1, tmp_path))
    named = PathDependence().recipes(Setting("tiny", ("npo", "graddiff"), 1, tmp_path))
    assert named["npo"].spec() == own["npo"].spec()
    assert named["npo"].spec()["objective"]["beta"] == 0.5
    assert set(named) == {"npo", "graddiff"}


def test_an_order_that_was_settled_before_is_told() -> None:
    curves = {"C": [-9.0, -20.0], "U": [-1.0, -30.0], "R": [-5.0, -6.0]}
    runs = [{"steps": [0, 4], "curves": curves, "stopped": None}]
    later = [{**runs[0], "curves": {**curves, "C": [-4.0, -20.0]}}]
    found = depth_findings({"gradient_ascent": {"CUR": runs, "RCU": later}})
    assert [row["depth"] for row in found.rows] == ["deep", "deep"]
    assert [row["steps until C is below R"] for row in found.rows] == [0.0, 4.0]
    first, second = found.runs
    assert (first["order"], first["seed"], first["depth"]) == ("CUR", 0, "deep")
    assert (first["C before"], second["C before"], second["U after"]) == (-9.0, -4.0, -30.0)
    assert found.notes == [
        "gradient_ascent: deep: CUR, RCU.",
        "gradient_ascent: after CUR C was below R before anything was forgotten, so being deep "
        "says little there.",
    ]


def test_depth_runs(model: str, tmp_path: Path) -> None:
    experiment = PathDepth(
        orders=("RCU", "URC"), people=4, epochs=2, batch_size=2, stage_epochs=1, learning_rate=1e-3
    )
    found = experiment.run(setting(model, tmp_path))
    assert [row["order"] for row in found.rows] == ["RCU", "URC"]
    for row, chart in zip(found.rows, found.charts, strict=True):
        assert row["depth"] in ("deep", "superficial", "none")
        lines = {curve.name: curve.points for curve in chart.curves}
        assert [x for x, _ in lines["U"]] == [0, 2, 4]
        assert lines["U"][-1][1] == row["U after"] < row["U before"]
    assert experiment.run(setting(model, tmp_path)) == found


@pytest.mark.parametrize(
    ("experiment", "methods", "match"),
    [
        (PathDependence(positions=(1,)), (), "two or more"),
        (PathDependence(positions=(1, 5)), (), "1 to 4"),
        (PathDependence(), ("rocr",), "takes no training steps"),
        (PathDependence(), ("gradient_accent",), "gradient_ascent"),
        (PathDepth(orders=("RCC",)), (), "no order"),
        (PathDepth(orders=()), (), "no order"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    experiment: Any, methods: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=match):
        experiment.run(setting("no such model", tmp_path, methods=methods))
