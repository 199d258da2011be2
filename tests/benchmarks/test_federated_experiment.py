"""Federated unlearning compared: shares and sentences by hand, one run on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from delible.errors import RecipeError
from delible.experiments.federated.experiment import FederatedUnlearning
from delible.experiments.federated.findings import after, fallen, findings, shares
from delible.lm.lm import LM
from delible.measure.benchmark import Setting
from delible.testing import tiny_model, tiny_tokenizer


def point(phase: str, forget: float, retain: float, **more: Any) -> dict[str, Any]:
    return {
        "phase": phase, "forget/rouge_l_recall": forget, "retain/rouge_l_recall": retain,
        "forget/answer_probability": forget / 2, "retain/answer_probability": retain / 2, **more,
    }  # fmt: skip


def cell(*points: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"curve": list(points), "bytes_down": 4_000_000, "bytes_up": 2_000_000,
            "left_out_in_all": 1, **more}  # fmt: skip


GOOD = cell(
    point("learned", 0.8, 0.9), point("unlearn", 0.2, 0.7, change=1.0),
    point("recover", 0.3, 0.8, change=0.5), point("recover", 0.4, 0.9, change=0.25),
)  # fmt: skip


def test_shares_by_hand() -> None:
    assert fallen(0.2, 0.8) == pytest.approx(0.75)
    assert fallen(0.2, 0.0) is None
    assert fallen(None, 0.5) is None
    assert shares(GOOD) == pytest.approx({"forgotten": 0.75, "lasting": 0.5, "kept": 1.0})
    retrained = cell(point("learned", 0.8, 0.9), point("retrain", 0.1, 0.9, change=2.0))
    assert shares(retrained)["forgotten"] is None
    assert shares(retrained)["lasting"] == pytest.approx(0.875)
    assert after(GOOD["curve"], ("recover",)) == GOOD["curve"][-1]
    assert after(GOOD["curve"], ("retrain",)) is None


def test_table_charts_and_sentences() -> None:
    ruined = cell(
        point("learned", 0.8, 0.9), point("unlearn", 0.7, 0.9, change=1.0),
        point("recover", 0.6, 0.45, change=0.0),
    )  # fmt: skip
    nothing = cell(point("learned", 0.1, 0.1), point("unlearn", 0.1, 0.1, change=0.0))
    found = findings({
        ("fedavg", "global", "npo"): [GOOD, {"failed": "no memory"}],
        ("fedadam", "client", "npo"): [ruined],
        ("fedyogi", "global", "npo"): [nothing],
        ("fedavg", "global", "retrain"): [cell(point("learned", 0.8, 0.9),
                                               point("retrain", 0.1, 0.9, change=2.0))],
    })  # fmt: skip
    rows = {(row["server"], row["method"]): row for row in found.rows}
    best = rows["fedavg", "npo"]
    assert best["forget, unlearned, ROUGE-L"] == pytest.approx(0.2)
    assert best["retain, recovered, ROUGE-L"] == pytest.approx(0.9)
    assert best["megabytes"] == pytest.approx(6.0)
    assert best["left out"] == pytest.approx(1.0)
    assert best["moved"] == pytest.approx(0.25)
    assert len({tuple(row) for row in found.rows}) == 1  # the same columns
    notes = " ".join(found.notes)
    assert "npo under fedavg: forgotten 0.75, as wanted (0.6 or more)" in notes
    assert "lasting 0.50, where more than 0.5 was wanted; kept 1.00, as wanted" in notes
    assert "kept 0.50, where 0.95 or more was wanted" in notes
    assert "npo under fedyogi: the model had learned too little" in notes
    assert "npo under fedavg failed: no memory" in notes
    assert "retrain under fedavg: 0.10 of the forgotten is said by a model" in notes
    curve = next(chart for chart in found.charts if chart.title == "fedavg: forget").curves[0]
    assert curve.points == [(0.0, 0.8), (1.0, 0.2), (2.0, 0.3), (3.0, 0.4)]
    assert [run["seed"] for run in found.runs if run["server"] == "fedavg"] == [0, 0]


def test_a_run_on_a_tiny_model_goes_on_where_it_was(tmp_path: Path) -> None:
    LM(tiny_model(), tiny_tokenizer(), name="tiny").save(tmp_path / "model")
    experiment = FederatedUnlearning(
        people=5, forget=1, clients=2, aggregations=("fedavg",), learn_rounds=1, rounds=1,
        epochs=1, unlearn_epochs=1, rank=2, records=2, learning_rate=1e-3,
    )  # fmt: skip
    told: list[str] = []
    setting = Setting(
        str(tmp_path / "model"), ("npo",), 1, tmp_path / "out",
        progress=lambda what, done, total: told.append(what),
    )  # fmt: skip
    found = experiment.run(setting)
    assert [(row["server"], row["method"]) for row in found.rows] == [
        ("fedavg", "npo"), ("fedavg", "retrain"),
    ]  # fmt: skip
    assert all(row["megabytes"] > 0 for row in found.rows)
    phases = [row["method"] for row in found.runs]
    assert phases == ["npo", "retrain"]
    cells = sorted((tmp_path / "out" / "cells").glob("*.json"))
    assert len(cells) == 2
    times = [one.stat().st_mtime_ns for one in cells]
    again = experiment.run(setting)
    assert again.rows == found.rows
    assert [one.stat().st_mtime_ns for one in cells] == times


def test_bad_input_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave nobody to keep"):
        FederatedUnlearning(people=4, forget=4).run(Setting("tiny", (), 1, tmp_path))
    with pytest.raises(RecipeError, match="place 'wagle'"):
        FederatedUnlearning().run(Setting("tiny", ("wagle",), 1, tmp_path))
    with pytest.raises(RecipeError, match="a client unlearns by a recipe"):
        FederatedUnlearning().run(Setting("tiny", ("rome",), 1, tmp_path))
