"""The continual experiment: its numbers by hand, and one run on a tiny model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from delible.errors import RecipeError
from delible.experiments.continual.experiment import METHODS, Continual
from delible.experiments.continual.findings import Point, findings
from delible.measure.benchmark import Setting
from delible.records import QA
from delible.sequence.result import SequenceResult, Step
from delible.testing import tiny_model, tiny_tokenizer


class HashedWords:
    identity = "words-64"

    def encode(self, texts: Sequence[str]) -> Any:
        vectors = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, zlib.crc32(word.encode()) % 64] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("continual")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "random")
    tiny_tokenizer().save_pretrained(folder / "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        patch.setattr("delible.achieved.SAID_TOKENS", 2)
        patch.setattr("delible.finishing.SHOWN_TOKENS", 2)
        patch.setattr(
            "delible.experiments.continual.experiment.GENERATED",
            {"rouge_l_f1": {"max_new_tokens": 2}},
        )
        patch.setattr("delible.procedures.fit.sentence_encoder", lambda _=None: HashedWords())
        yield str(folder / "random")


def sequence(tmp_path: Path, *seconds: float) -> SequenceResult:
    steps = [Step(0, "", "start", "", "m", values={"1": [0.5], "2": [0.4], "retain": [0.8]})]
    steps.append(Step(1, "1", "done", "", "r1", seconds[0], values={"1": [0.1], "retain": [0.4]}))
    steps.append(
        Step(2, "2", "skipped", "like 1", "r1", values={"1": [0.2], "2": [0.3], "retain": [0.4]})
    )
    return SequenceResult(tmp_path, "fit", "m", ("1", "2"), tuple(steps))


def test_degrees_are_closeness_to_the_reference(tmp_path: Path) -> None:
    found = {
        "original": [Point(2, {"forget": 80.0, "retain": 75.0})],
        "reference": [Point(2, {"forget": 20.0, "retain": 50.0})],
        "fit": [
            Point(2, {"forget": 15.0, "retain": 55.0}),
            Point(2, {"forget": 25.0, "retain": 45.0}, 1),
        ],
        "npo": [Point(2, {"forget": 0.0, "retain": 10.0})],
    }  # fmt: skip
    one = sequence(tmp_path, 4.0)
    result = findings(found, {"fit": [one], "npo": [one]}, {"npo, seed 0": "it collapsed."})
    rows = {row["method"]: row for row in result.rows}
    assert rows["fit"]["forget degree"] == pytest.approx(0.75)
    assert rows["fit"]["retain utility"] == pytest.approx(0.9)
    assert rows["reference"]["forget degree"] == rows["reference"]["retain utility"] == 1.0
    assert rows["original"]["forget degree"] == 0.0  # 4 times as much is left
    assert rows["original"]["retain utility"] == pytest.approx(0.5)
    assert rows["npo"]["retain utility"] == pytest.approx(0.2)
    assert rows["fit"]["seconds per request"] == 4.0
    assert rows["fit"]["skipped"] == 1
    assert "Forget degree after 2 requests: fit 0.75, npo 0.00." in result.notes
    assert "npo: retain utility is below 0.5 after 2 requests." in result.notes
    assert "fit skipped 1 requests as redundant." in result.notes
    assert "npo, seed 0 ended early: it collapsed." in result.notes
    charts = {
        chart.title: {one.name: one.points for one in chart.curves} for chart in result.charts
    }
    left = charts["What is left of everything deleted so far"]["fit"]
    assert left == [(1.0, pytest.approx(0.2)), (2.0, pytest.approx((0.4 + 0.75) / 2))]
    assert charts["What is kept"]["fit"][-1] == (2.0, pytest.approx(0.5))


def test_each_request_is_one_item_and_points_know_what_remains() -> None:
    _, tasks = Continual(requests=6, retain=3, points=(2, 6)).items()
    assert len(tasks) == 6
    for number, task in enumerate(tasks, start=1):
        assert len({one.subject for one in task.request.forget}) == 1
        assert len(task.splits["forget"]) == number
        assert len(task.splits["retain"]) == 9 - number
        gone = {one.subject for one in task.splits["forget"]}
        assert gone.isdisjoint(one.subject for one in task.relearned)
        kept = {one.question for one in task.request.retain if isinstance(one, QA)}
        assert kept.isdisjoint(
            one.question for each in tasks for one in each.request.forget if isinstance(one, QA)
        )


def test_a_method_that_declines_questions_gets_an_objective_for_passages() -> None:
    assert Continual().method("o3").spec()["objective"] == "npo"
    assert Continual(epochs=3).method("o3").spec()["epochs"] == 3


def test_points_lie_within_the_requests(model: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="between 1 and"):
        Continual.build("continual", requests=5, points=(6,))
    with pytest.raises(RecipeError, match="unknown method 'nothing'"):
        Continual(requests=2, points=(2,)).run(Setting(model, ("nothing",), 1, tmp_path))
    assert METHODS == ("o3", "fit", "uld", "npo")


def test_a_run_goes_through_all_requests_and_is_read_again(model: str, tmp_path: Path) -> None:
    experiment = Continual(
        requests=2, retain=2, points=(1, 2), epochs=1, learning_rate=1e-4, rows=3
    )
    setting = Setting(model, ("fit", "graddiff"), 1, tmp_path)
    found = experiment.run(setting)
    assert [(row["method"], row["requests"]) for row in found.rows] == [
        (name, number) for number in (1, 2) for name in ("original", "reference", "fit", "graddiff")
    ]
    by = {(row["method"], row["requests"]): row for row in found.rows}
    assert by["reference", 2]["retain utility"] in (1.0, None)
    assert all(row["forget score"] is not None for row in found.rows)
    assert (tmp_path / "sequences" / "fit-0" / "after" / "002.json").exists()
    table = pq.read_table(tmp_path / "continual.parquet").to_pylist()
    assert {row["method"] for row in table} >= {"original", "reference", "fit", "graddiff"}
    again = experiment.run(setting)
    assert again.rows == found.rows
