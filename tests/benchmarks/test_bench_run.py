"""The runner: cells that resume, a table that adds up, methods that fail alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from delible.bench import cell as one_cell
from delible.bench import run as runner
from delible.bench.cell import _options
from delible.bench.run import ORIGINAL, REFERENCE, bench, method_names
from delible.bench.table import mean_of_runs
from delible.benchmarks.world import WorldBenchmark
from delible.context import Context
from delible.errors import RecipeError
from delible.measure.benchmark import Data
from delible.systems.scripted import Scripted
from delible.testing.tiny import tiny_model, tiny_tokenizer

WORLD: dict[str, Any] = {"name": "world", "people": 6, "forget": 1, "limit": 4}
QUANTIZE = {"name": "quantize", "bits": 4, "group": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bench")
    tiny_model("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> runner.BenchResult:
    seen: list[runner.BenchResult] = []
    result = bench(
        WORLD, methods=("gradient_ascent", "target_detector"), model=model, seeds=2,
        attacks=(QUANTIZE,), out=tmp_path_factory.mktemp("out"), found=seen.append,
        options={
            "gradient_ascent": {"max_steps": 2, "batch_size": 4},
            "target_detector": {"similarity": False},
        },
    )  # fmt: skip
    assert [len(one.cells) for one in seen] == list(range(1, len(result.cells) + 1))
    assert seen[-1] == result
    return result


def test_every_row_is_there_and_measured(finished: runner.BenchResult) -> None:
    rows = {row.method: row for row in finished.table.rows}
    assert set(rows) == {REFERENCE, ORIGINAL, "gradient_ascent", "target_detector"}
    for name, runs in ((ORIGINAL, 1), ("gradient_ascent", 2)):
        number = rows[name].numbers["answer_probability/forget"]
        assert number.runs == runs
        assert number.mean is not None
        assert 0 < number.mean < 1
    attacked = [column.key for column in finished.table.columns if "attack" in column.key]
    assert attacked
    assert all(rows["gradient_ascent"].numbers[key].mean is not None for key in attacked)
    ((recovered,),) = [[key for key in attacked if key.endswith("/recovered")]]
    after = recovered.replace("/recovered", "/answer_probability")
    for cell in finished.cells:  # quantization trains on no rows, so all are asked again
        if recovered in cell["numbers"]:
            numbers = cell["numbers"]
            apart = numbers[after] - numbers["answer_probability/forget"]
            assert numbers[recovered] == pytest.approx(apart, abs=1e-5)
    # behind a guard there are no scores, and no weights to attack
    assert rows["target_detector"].numbers["answer_probability/forget"].mean is None
    assert rows["target_detector"].numbers["rouge_l_recall/forget"].mean is not None
    assert rows["target_detector"].failed is None


def test_roles_reach_every_cell(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[object] = []

    def unlearn(start: str, request: object, *, context: Context, **options: object) -> object:
        played.append((context.seed, context.roles.named()))
        raise RecipeError("far enough")

    monkeypatch.setattr(one_cell, "unlearn", unlearn)
    made = bench(
        WORLD, methods=("gradient_ascent",), model=model, seeds=2, out=tmp_path,
        roles={"writer": "somebody", "judge": {"system": "another", "calls": 3}},
    )  # fmt: skip
    roles = {"judge": {"system": "another", "calls": 3}, "writer": "somebody"}
    assert played == [(0, roles), (1, roles)]
    assert made.common["roles"] == roles
    with pytest.raises(RecipeError, match="cells open it"):
        bench(WORLD, model=model, roles={"judge": Scripted([])})  # type: ignore[dict-item]


def test_all_methods_have_their_first_run_before_any_has_its_second(
    finished: runner.BenchResult,
) -> None:
    seeds = [cell["seed"] for cell in finished.cells]
    assert seeds == sorted(seeds)


def test_the_reference_is_what_methods_are_compared_with(finished: runner.BenchResult) -> None:
    rows = {row.method: row for row in finished.table.rows}
    assert rows[REFERENCE].numbers["forget_quality_log10"].mean == 0  # its own distribution
    assert rows["gradient_ascent"].numbers["forget_quality_log10"].mean is not None


def test_means_are_those_of_the_records(finished: runner.BenchResult) -> None:
    table = parquet.read_table(finished.folder / "leaderboard.parquet").to_pylist()
    mine = [row for row in table if row["method"] == ORIGINAL and row["key"].endswith("/forget")]
    key = "answer_probability/forget"
    records = [row["value"] for row in mine if row["key"] == key and row["record"] is not None]
    means = [row["value"] for row in mine if row["key"] == key and row["record"] is None]
    assert means == [pytest.approx(np.mean(records))]
    assert len(records) == WORLD["limit"]
    assert not (finished.folder / "models").exists()


def test_a_second_run_only_reads(
    finished: runner.BenchResult, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(one_cell, "_system", never)
    again = bench(
        WORLD, methods=("gradient_ascent",), model=model, seeds=2, attacks=(QUANTIZE,),
        out=finished.folder, options={"gradient_ascent": {"max_steps": 2, "batch_size": 4}},
    )  # fmt: skip
    assert len(again.cells) == 4


def test_a_failing_method_ends_no_other(model: str, tmp_path: Path) -> None:
    result = bench(
        WORLD, methods=("gradient_ascent", "rocr"), model=model, out=tmp_path,
        options={"gradient_ascent": {"max_steps": 1}, "rocr": {"no_such_option": 1}},
    )  # fmt: skip
    rows = {row.method: row for row in result.table.rows}
    assert "no_such_option" in str(rows["rocr"].failed)
    assert rows["gradient_ascent"].failed is None
    assert not [path for path in (tmp_path / "cells").iterdir() if "rocr" in path.name]


def test_names_and_groups() -> None:
    assert method_names(["npo", "none", "npo"]) == ["npo"]
    everything = method_names(["all-optimisation"])
    assert "npo" in everything
    assert "finetune" not in everything
    assert "rocr" not in everything
    with pytest.raises(RecipeError, match="unknown method 'npoo'"):
        method_names(["npoo"])


@pytest.mark.parametrize(
    ("method", "rate"),
    [("npo", 5e-5), ("purge", 5e-5), ("rome", None), ("grace", None), ("wise", None)],
)
def test_the_budget_is_for_what_trains_weights(method: str, rate: float | None) -> None:
    benchmark = WorldBenchmark()
    manifest = {"method": method, "model": "default", "tune": 0, "options": {"seed": 1}}
    options, _ = _options(benchmark, manifest, benchmark.tasks(Data())[0], [])
    assert options.get("learning_rate") == rate
    assert options["seed"] == 1


def test_prompt_attacks_are_refused(model: str) -> None:
    with pytest.raises(RecipeError, match="changes prompts"):
        bench(WORLD, model=model, attacks=("paraphrase",))


def test_an_interval_is_the_t_interval() -> None:
    number = mean_of_runs([1.0, 2.0, 3.0, None])
    assert number.mean == 2.0
    assert number.runs == 3
    # t(0.975, 2) = 4.30265, standard error 1 / sqrt(3)
    assert number.high == pytest.approx(2 + 4.302653 / np.sqrt(3), rel=1e-6)
    assert mean_of_runs([None]).mean is None
    assert mean_of_runs([0.5]).low is None
