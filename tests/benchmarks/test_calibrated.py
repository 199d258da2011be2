"""Calibrated comparison: places and table by hand, one run on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delible.errors import RecipeError
from delible.experiments.calibrated import Calibrated, findings, ranks
from delible.measure.benchmark import Setting
from delible.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("calibrated")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "random")
    tiny_tokenizer().save_pretrained(folder / "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "random")


def cell(trained: tuple[float, float], mixed: tuple[float, float], alpha: float | None) -> Any:
    return {
        "trained": {"forget": [trained[0]] * 2, "retain": [trained[1]]},
        "calibrated": {"forget": [mixed[0]] * 2, "retain": [mixed[1]]},
        "alpha": alpha,
    }


def test_places() -> None:
    assert ranks({"a": 0.2, "b": 0.1, "c": None, "d": 0.2}) == {"a": 2, "b": 1, "c": None, "d": 2}


def test_a_method_that_ruins_the_model_loses_its_place() -> None:
    ends = {"original": cell((0.9, 0.9), (0.9, 0.9), None)}
    found = findings(
        ends,
        {
            "ruin": [cell((0.0, 0.0), (0.85, 0.86), 0.05)],
            "careful": [cell((0.4, 0.8), (0.5, 0.86), 0.8), cell((0.2, 0.8), (0.3, 0.86), 0.6)],
            "broken": [{"failed": "it cannot."}],
        },
    )
    rows = {row["method"]: row for row in found.rows}
    assert len({tuple(row) for row in found.rows}) == 1
    assert rows["careful"]["alpha"] == pytest.approx(0.7)
    assert rows["careful"]["forget, calibrated"] == pytest.approx(0.4)
    assert 0.3 <= rows["careful"]["95 % from"] <= 0.4 <= rows["careful"]["to"] <= 0.5
    places = {
        name: (row["place as trained"], row["place, calibrated"]) for name, row in rows.items()
    }
    assert places == {
        "original": (None, None), "ruin": (1, 2), "careful": (2, 1), "broken": (None, None),
    }  # fmt: skip
    assert rows["broken"]["forget, calibrated"] is None
    assert found.notes == [
        "Calibrated, the order is another: careful, ruin (as trained: ruin, careful).",
        "ruin keeps the retain records only at alpha 0.05: what is compared is almost the model "
        "before.",
        "broken failed: it cannot.",
    ]
    lines = {curve.name: curve.points for curve in found.charts[0].curves}
    assert lines["ruin"] == [(0.0, 0.0), (0.86, 0.85)]
    assert "broken" not in lines


def test_every_run_is_there_besides_the_means() -> None:
    ends = {"original": cell((0.9, 0.9), (0.9, 0.9), None)}
    late = [{"failed": "once."}, cell((0.2, 0.8), (0.3, 0.86), 0.6)]
    found = findings(ends, {"late": late})
    runs = {(run["method"], run["seed"]): run for run in found.runs}
    assert set(runs) == {("original", 0), ("late", 1)}
    assert runs["late", 1]["forget, as trained"] == [0.2, 0.2]
    assert runs["late", 1]["forget, calibrated"] == [0.3, 0.3]
    assert runs["late", 1]["retain, calibrated"] == [0.86]


def test_it_runs_and_resumes(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.benchmarks.world.WorldBenchmark.learning", lambda *_: _Quick())
    experiment = Calibrated(people=4, forget=1, records=3, learning_rate=1e-2, epochs=1)
    setting = Setting(
        model=model, methods=("graddiff", "gradient_ascent"), seeds=1, folder=tmp_path
    )
    found = experiment.run(setting)
    assert [row["method"] for row in found.rows] == [
        "original", "reference", "graddiff", "gradient_ascent",
    ]  # fmt: skip
    rows = {row["method"]: row for row in found.rows}
    known = rows["original"]["retain, as trained"]
    assert known > 0.5
    for name in ("graddiff", "gradient_ascent"):
        row = rows[name]
        assert row["retain, as trained"] < 0.95 * known
        assert 0 < row["alpha"] < 1
        assert row["retain, calibrated"] >= 0.95 * known
        assert row["forget, as trained"] <= row["forget, calibrated"] <= 1
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4
    monkeypatch.setattr(Calibrated, "cell", None)
    assert experiment.run(setting) == found


class _Quick:
    options = {"learning_rate": 1e-2, "epochs": 60, "batch_size": 8}  # noqa: RUF012
    slots: dict[str, Any] = {}  # noqa: RUF012


def test_an_unknown_method_is_refused_at_once(tmp_path: Path) -> None:
    setting = Setting(model="no such model", methods=("nop",), seeds=1, folder=tmp_path)
    with pytest.raises(RecipeError, match="npo"):
        Calibrated().run(setting)
