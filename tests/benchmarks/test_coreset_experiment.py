"""The coreset experiment as a component: its data, its table by hand, one run on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delible.component import build
from delible.errors import RecipeError
from delible.experiments.coreset.experiment import (
    KINDS,
    CoresetEffect,
    findings,
    table,
    wordings,
)
from delible.experiments.coreset.row import CoresetRow
from delible.measure.benchmark import Setting
from delible.records import QA
from delible.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("coreset")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "random")
    tiny_tokenizer().save_pretrained(folder / "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "random")


def row(selector: str, fraction: float, forget: float | None, **changes: Any) -> CoresetRow:
    given: dict[str, Any] = {
        "selector": selector, "fraction": fraction, "seed": 0, "rows": 4, "steps": 8,
        "epochs": 2.0, "tokens": 100, "seconds": 1.0, "selection_seconds": 0.0,
        "forget_probability": forget, "selected_probability": 0.1,
        "unselected_probability": 0.5, "retain_probability": 0.9,
    }  # fmt: skip
    return CoresetRow(**{**given, **changes})


# ---- the data


def test_a_theme_repeats_its_facts_and_independent_facts_do_not() -> None:
    experiment = CoresetEffect(rows=60)
    theme, facts = (experiment.material(kind).request for kind in KINDS)
    assert len({record.subject for record in theme.forget}) < 3
    assert len(facts.forget) == 60
    asked = {record.question for record in facts.forget if isinstance(record, QA)}
    assert len(asked) == 60
    assert len({record.subject for record in facts.forget}) == 12
    for request in (theme, facts):
        assert 40 <= len(request.forget) <= 80
        assert len({record.digest for record in request.forget}) == len(request.forget)
        gone = {record.subject for record in request.forget}
        assert not gone & {record.subject for record in request.retain}
    material = experiment.material(KINDS[0])
    assert set(material.learned) == {*theme.forget, *theme.retain}


def test_wordings_are_all_pairs() -> None:
    fact = QA(question="Q1", answer="A1", paraphrases=("Q2",), paraphrased_answers=("A2", "A3"))
    pairs = [(one.question, one.answer) for one in wordings(fact)]
    assert pairs == [(q, a) for q in ("Q1", "Q2") for a in ("A1", "A2", "A3")]


# ---- the table


def test_numbers_are_means_over_seeds() -> None:
    runs = [
        row("start", 0.0, 0.9), row("all", 1.0, 0.1), row("all", 1.0, 0.3, seed=1),
        row("random_coreset", 0.1, 0.5), row("random_coreset", 0.1, 0.4, seed=1,
            unselected_probability=0.7, selected_extraction=0.5),
    ]  # fmt: skip
    start, full, part = table(runs, connect=False)
    assert part["forget probability"] == pytest.approx(0.45)
    assert part["of other rows"] == pytest.approx(0.6)
    assert part["extraction, chosen"] == 0.5  # one run has a value
    assert part["extraction, others"] is None
    assert part["share of effect"] == pytest.approx((0.9 - 0.45) / (0.9 - 0.2))
    assert (start["share of effect"], full["share of effect"]) == (0.0, 1.0)
    assert start["of other rows"] is None


def test_every_run_is_there_besides_the_means() -> None:
    runs = [row("start", 0.0, 0.9), row("all", 1.0, 0.1, forget_values=[0.0, 0.2])]
    found = findings({("one theme", "npo"): runs})
    start, full = found.runs
    assert (start["data"], start["selector"]) == ("one theme", "start")
    assert (full["method"], full["forget_values"]) == ("npo", [0.0, 0.2])


def test_nothing_is_claimed_without_numbers() -> None:
    runs = [row("start", 0.0, 0.9), row("all", 1.0, 0.9), row("grand", 0.1, 0.5)]
    assert [line["share of effect"] for line in table(runs, connect=False)] == [None] * 3
    broken = [row("start", 0.0, 0.9), row("all", 1.0, None), row("grand", 0.1, 0.5)]
    found = findings({("one theme", "npo"): broken})
    assert [line["share of effect"] for line in found.rows] == [None] * 3
    assert "an unknown part" in found.notes[0]
    assert [curve.points for curve in found.charts[0].curves] == [[(0.1, 0.5)]]


def test_charts_and_notes() -> None:
    runs = [
        row("start", 0.0, 0.9), row("all", 1.0, 0.1),
        row("grand", 0.1, 0.5), row("grand", 0.05, 0.6),
        row("keywords", 1.0, 0.3, barriers={"forget": 0.0, "retain": 0.0}),
        row("min_k", 0.1, 0.2, barriers={"forget": 0.01, "retain": 0.03}),
    ]  # fmt: skip
    found = findings({("one theme", "npo"): runs}, connect=True)
    lines = {curve.name: curve.points for curve in found.charts[0].curves}
    assert lines == {
        "grand": [(0.05, 0.6), (0.1, 0.5), (1.0, 0.1)],
        "min_k": [(0.1, 0.2), (1.0, 0.1)],
    }
    assert len({tuple(line) for line in found.rows}) == 1
    assert any("min_k at 10 % is not linearly connected" in note for note in found.notes)
    assert any("10 % by grand: 0.5 of the effect" in note for note in found.notes)


def test_the_search_for_the_length_has_a_column_and_a_sentence() -> None:
    runs = [
        row("start", 0.0, 0.9), row("all", 1.0, 0.1), row("all", 1.0, 0.1, seed=1),
        row("grand", 0.05, 0.1, reached=True), row("grand", 0.05, 0.1, reached=True, seed=1),
        row("grand", 0.1, 0.5, reached=True), row("grand", 0.1, 0.6, reached=False, seed=1,
            epochs=40.0),
        row("min_k", 0.1, 0.6, reached=False, epochs=50.0), row("moderate", 0.1, 0.8),
    ]  # fmt: skip
    found = findings({("one theme", "npo"): runs}, length="shortest")
    reached = [line["full effect reached"] for line in found.rows]
    assert reached == [None, None, 1.0, 0.5, 0.0, None]
    always, half, never, none = found.notes[1:]
    assert always.endswith(" The full set's effect is reached in 2 epochs.")
    assert half.endswith("reached with 50 % of the seeds; 21 epochs on average.")
    assert never.endswith(" The full set's effect is never reached; most of it in 50 epochs.")
    assert none.endswith("there was no effect to reach.")
    found = findings({("one theme", "npo"): runs})
    assert not any("full effect reached" in line for line in found.rows)
    assert not any("reach" in note for note in found.notes)


# ---- the whole way


def test_it_runs_and_resumes(model: str, tmp_path: Path) -> None:
    experiment = build(
        "benchmark",
        {"name": "coreset", "rows": 8, "fractions": ("0.25",), "selectors": ("random_coreset",),
         "kinds": ("independent facts",), "epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
    )  # fmt: skip
    setting = Setting(model=model, methods=("gradient_ascent",), seeds=1, folder=tmp_path)
    found = experiment.run(setting)
    assert [line["selection"] for line in found.rows] == ["start", "all", "random_coreset"]
    start, full, part = found.rows
    assert full["updates"] == part["updates"] == 3  # 10 rows
    assert part["rows"] == 2
    for run in found.runs:
        values = run["forget_values"]
        assert len(values) == 10
        assert sum(values) / 10 == pytest.approx(run["forget_probability"])
    assert part["of other rows"] > part["of chosen rows"]
    assert full["forget probability"] < start["forget probability"]
    folder = tmp_path / "independent-facts" / "gradient_ascent"
    assert (folder / "rows" / "random_coreset-0.25-seed0.chosen.json").exists()
    assert experiment.run(setting) == found


def test_it_trains_until_as_much_is_forgotten(model: str, tmp_path: Path) -> None:
    experiment = build(
        "benchmark",
        {"name": "coreset", "rows": 8, "fractions": ("0.25",), "selectors": ("random_coreset",),
         "kinds": ("independent facts",), "epochs": 1, "batch_size": 4, "learning_rate": 1e-3,
         "length": "shortest", "grid": 2, "least_effect": 1.0},
    )  # fmt: skip
    setting = Setting(model=model, methods=("gradient_ascent",), seeds=1, folder=tmp_path)
    found = experiment.run(setting)
    kept = tmp_path / "independent-facts" / "gradient_ascent" / "rows"
    names = sorted(path.name for path in kept.glob("random_coreset-*-epochs*.json"))
    assert names == [f"random_coreset-0.25-seed0-epochs{epochs}.json" for epochs in (1, 4)]
    part = found.rows[-1]
    assert part["full effect reached"] == (part["share of effect"] >= 1)
    assert (part["updates"], part["epochs"]) == (4, 4)
    assert experiment.run(setting) == found


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    setting = Setting(model="no such model", methods=(), seeds=1, folder=tmp_path)
    with pytest.raises(RecipeError, match="random_coreset"):
        CoresetEffect(selectors=("random_corset",)).run(setting)
    with pytest.raises(RecipeError, match="kinds"):
        build("benchmark", {"name": "coreset", "kinds": ("one topic",)})
    with pytest.raises(RecipeError, match="length"):
        build("benchmark", {"name": "coreset", "length": "longest"})
