"""A real Ray cluster of two nodes on this machine, one of which is killed under its work."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_work import slow

import delible
from delible.audit.run import audit
from delible.bench.run import bench
from delible.bench.table import ORIGINAL
from delible.errors import RecipeError, RunError
from delible.records import QA, ForgetRequest
from delible.spread.hands import hands, spread
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.tune import tune

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Bytes of a node's object store: what comes back is small.
STORE = 80 * 2**20
#: Pieces, two seconds each; a node may take a while until it works.
COUNT = 14


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Two nodes with one CPU each."""
    ray = pytest.importorskip("ray")
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine they would hardly run
    # nodes find delible and these tests as this process does
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    made = utils.Cluster(initialize_head=True, head_node_args=node)
    try:
        made.add_node(num_cpus=1, object_store_memory=STORE)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def other(cluster: Any) -> Any:
    """The node that is not the head."""
    return next(one for one in cluster.list_all_nodes() if one is not cluster.head_node)


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_work_of_a_lost_node_is_done_elsewhere_and_nothing_twice(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = other(cluster)
    pieces = [{"value": value, "notes": str(tmp_path), "seconds": 2.0} for value in range(COUNT)]
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    kept: list[int] = []
    before: set[int] = set()

    def keep(piece: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        kept.append(piece["value"])
        over = {name for (name,) in lines(ended)}
        there = {name for name, node in lines(begun) if node == lost.node_id}
        if there - over and lost in cluster.list_all_nodes():
            cluster.remove_node(lost, allow_graceful=False)
            before.update(kept)
        return result

    with hands(slow, ray=True, folders=[tmp_path]) as doing:
        assert doing.at_once == 2
        found = list(spread(doing, [[one] for one in pieces], keep=keep))
        assert lost not in cluster.list_all_nodes()
    assert sorted(one["value"] for (one,) in found) == [2 * value for value in range(COUNT)]
    assert sorted(kept) == list(range(COUNT)), "each came back once"
    names = [int(name) for name, _ in lines(begun)]
    again = {name for name in names if names.count(name) > 1}
    assert len({node for _, node in lines(begun)}) == 2, "both worked"
    assert len(names) == COUNT + 1, "the one that was under way there was begun again"
    assert not again & before, "nothing that had come back was"
    assert "it is done elsewhere" in caplog.text


def test_another_code_on_a_node_is_refused_at_the_start(cluster: Any, tmp_path: Path) -> None:
    copy = tmp_path / "other" / "delible"
    shutil.copytree(
        Path(delible.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "\n# changed\n")
    path = os.pathsep.join([str(copy.parent), os.environ["PYTHONPATH"]])
    cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars={"PYTHONPATH": path})
    cluster.wait_for_nodes()
    with (
        pytest.raises(RunError, match=r"do not run the same: delible's code is \w+ here, \w+ on"),
        hands(slow, ray=True),
    ):
        pass


WORLD: dict[str, Any] = {"name": "world", "people": 6, "forget": 1, "limit": 4}
METHODS = ("gradient_ascent", "graddiff", "npo")


def test_a_bench_on_a_cluster_that_loses_a_node_gives_the_local_numbers(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given: dict[str, Any] = {
        "methods": METHODS, "model": str(folder), "seeds": 2,
        "options": {name: {"max_steps": 3, "batch_size": 4} for name in METHODS},
    }  # fmt: skip
    lost = other(cluster)

    def found(result: Any) -> None:
        if len(result.cells) == 4 and lost in cluster.list_all_nodes():
            cluster.remove_node(lost, allow_graceful=False)

    there = bench(WORLD, **given, out=tmp_path / "ray", ray=True, cpus=1, found=found)
    here = bench(WORLD, **given, out=tmp_path / "here")
    assert not [cell for cell in there.cells if "failed" in cell]
    assert len(there.cells) == len(here.cells) == 2 + 2 * len(METHODS)
    for row, other_row in zip(
        sorted(there.table.rows, key=lambda one: one.method),
        sorted(here.table.rows, key=lambda one: one.method),
        strict=True,
    ):
        assert row.method == other_row.method
        for key, number in other_row.numbers.items():
            if key in ("seconds", "peak_gib"):
                continue
            assert row.numbers[key].runs == number.runs
            if number.mean is not None:
                assert row.numbers[key].mean == pytest.approx(number.mean, rel=1e-3, abs=1e-5)
    # the same cells on disk, and none of them is asked again
    names = [
        sorted(path.name for path in (tmp_path / one / "cells").glob("*.json"))
        for one in ("ray", "here")
    ]
    assert len(names[0]) == len(names[1]) == len(here.cells)
    assert any(ORIGINAL in json.loads(path.read_text())["method"]
               for path in (tmp_path / "ray" / "cells").glob("*.json"))  # fmt: skip
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray" / "cells").glob("*.json")}
    again = bench(WORLD, **given, out=tmp_path / "ray", ray=True, cpus=1)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray" / "cells").glob("*.json")}
    assert before == after
    assert len(again.cells) == len(here.cells)
    with pytest.raises(RecipeError, match="either"):
        bench(WORLD, **given, out=tmp_path / "ray", ray=True, jobs=2)


def test_an_audit_and_a_search_on_a_cluster_give_the_local_numbers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    request = ForgetRequest(
        forget=tuple(QA(question=f"Town of {n}?", answer=f"Town {n}.") for n in range(4)),
        retain=tuple(QA(question=f"Job of {n}?", answer=f"Job {n}.") for n in range(8)),
    )
    asked: dict[str, Any] = {
        "metrics": ["answer_probability"], "rows": 2,
        "attacks": [{"name": "prefix", "forms": 1}, {"name": "relearn", "steps": 1}],
    }  # fmt: skip
    searched: dict[str, Any] = {"utility": 0.01, "max_steps": 1, "batch_size": 2, "epochs": 1}
    numbers, trials = [], []
    for ray in (True, False):
        monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / f"cache-{ray}"))
        there = {"ray": True, "cpus": 1} if ray else {}
        found = audit(str(folder), request, before=str(folder), **asked, **there)
        numbers.append({
            (one.system, one.attack, one.split, one.metric): one.value for one in found.measurements
        })  # fmt: skip
        several = {**there} if ray else {"jobs": 2}
        result = tune(
            str(folder), request, trials=8, out=tmp_path / f"tune-{ray}", **searched, **several
        )
        trials.append(result.trials)
    assert list(numbers[0]) == list(numbers[1])
    for key, value in numbers[1].items():
        wanted = None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)
        assert numbers[0][key] == wanted
    for mine, other_one in zip(*trials, strict=True):
        assert mine.failed is other_one.failed is None
        assert mine.options == other_one.options
        assert mine.leak == pytest.approx(other_one.leak, rel=1e-3, abs=1e-6)
        assert mine.utility == pytest.approx(other_one.utility, rel=1e-3)
