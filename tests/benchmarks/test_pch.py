"""PCH: items that exist nowhere, requests that add up, chains that go on from the last result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delible.bench import cell as one_cell
from delible.bench.run import ORIGINAL, REFERENCE, bench
from delible.benchmarks.pch import KINDS, PCH, items
from delible.component import build
from delible.errors import RecipeError
from delible.measure.benchmark import (
    Benchmark,
    Data,
    Learning,
    Task,
)
from delible.records import QA
from delible.system.asks import Prompt
from delible.systems.guarded import GuardedSystem
from delible.testing.tiny import tiny_model, tiny_tokenizer

QUICK = {"max_steps": 1, "batch_size": 4}


def pch(**options: Any) -> Benchmark:
    return build("benchmark", {"name": "pch", **options})  # type: ignore[no-any-return]


def subjects(records: Any) -> set[str]:
    return {record.subject for record in records}


def test_every_answer_stands_in_its_text() -> None:
    made = items(90, 0)
    assert all(item.answer in item.text for item in made)
    assert all(item.subject in item.text and item.subject in item.question for item in made)
    assert [item.kind for item in made[:6]] == [*KINDS, *KINDS]
    for what in ("subject", "text", "question"):
        assert len({getattr(item, what) for item in made}) == 90
    assert made == items(90, 0)
    assert made != items(90, 1)


def test_requests_add_up() -> None:
    tasks = pch(forget=7, retain=5, requests=3, checkpoints=3).tasks(Data())
    assert [task.after for task in tasks] == [None, "request001", "request002"]
    assert [len(task.request.subjects) for task in tasks] == [2, 3, 2]
    deleted: set[str] = set()
    everything = subjects(tasks[0].learn)
    assert len(everything) == 12
    for task in tasks:
        assert not deleted & set(task.request.subjects)  # each item once
        deleted |= set(task.request.subjects)
        assert subjects(task.request.forget) == set(task.request.subjects)
        assert subjects(task.splits["forget"]) == subjects(task.splits["forget_text"]) == deleted
        assert subjects(task.splits["retain"]) == everything - deleted
        assert subjects(task.relearned) == everything - deleted
        assert task.learn == tasks[0].learn
    # what is still to be deleted is asked about, and never given as something to keep
    kept = {subjects(task.request.retain) == everything - deleted for task in tasks}
    assert kept == {True}


def test_only_checkpoints_are_measured() -> None:
    tasks = pch(forget=6, retain=2, requests=6, checkpoints=2).tasks(Data())
    assert [bool(task.splits) for task in tasks] == [False, False, True] * 2
    assert [bool(task.relearned) for task in tasks] == [False, False, True] * 2
    assert len(tasks[2].splits["forget"]) == 3
    with pytest.raises(RecipeError, match="no more checkpoints than requests"):
        pch(requests=2, checkpoints=3)


def test_texts_alone_as_in_the_paper() -> None:
    (task,) = pch(forget=3, retain=3, requests=1, checkpoints=1, teach="texts").tasks(Data())
    assert {record.type for record in (*task.learn, *task.request.forget)} == {"passage"}
    assert all(isinstance(record, QA) for record in task.splits["forget"])
    assert len(task.learn) == 6
    both = pch(forget=3, retain=3, requests=1, checkpoints=1).tasks(Data())[0]
    assert len(both.learn) == 12
    limited = pch(forget=3, retain=3, requests=1, checkpoints=1, limit=1).tasks(Data())[0]
    assert {len(rows) for rows in limited.splits.values()} == {1}
    assert limited.learn == both.learn


# ---- end to end


class QuickPCH(PCH):
    """Learns two steps instead of twenty epochs."""

    def learning(self, model: str) -> Learning:
        return Learning({"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("pch")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(folder / "cache"))
        yield str(folder / "tiny")


@pytest.fixture(scope="module")
def ran(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three requests, the second one not measured; what every method was given."""
    asked: dict[str, Any] = {"gradient_ascent": [], "target_detector": []}
    unlearn = one_cell.unlearn

    def unlearned(start: str, request: Any, **options: Any) -> Any:
        result = unlearn(start, request, **options)
        asked[options["method"]].append((start, request, result.system))
        return result

    # three requests, two checkpoints: after the second (2 of 3, rounded) and the third
    chosen = QuickPCH(forget=3, retain=2, requests=3, checkpoints=2, limit=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_cell, "unlearn", unlearned)
        patch.setattr(one_cell, "build", lambda kind, spec: _quick(chosen, kind, spec))
        asked["result"] = bench(
            chosen, methods=("gradient_ascent", "target_detector"), model=model,
            out=tmp_path_factory.mktemp("out"),
            options={"gradient_ascent": QUICK, "target_detector": {"similarity": False}},
        )  # fmt: skip
    return asked


def _quick(chosen: Benchmark, kind: Any, spec: Any) -> Any:
    return chosen if kind == "benchmark" else build(kind, spec)


def tasks_of(ran: dict[str, Any]) -> list[Task]:
    return QuickPCH(forget=3, retain=2, requests=3, checkpoints=2, limit=1).tasks(Data())


@pytest.mark.slow
def test_the_stream_goes_on_from_the_last_result(ran: dict[str, Any]) -> None:
    tasks = tasks_of(ran)
    calls = ran["gradient_ascent"]
    assert [request for _, request, _ in calls] == [task.request for task in tasks]
    assert "target" in calls[0][0]
    for (start, _, _), before in zip(calls[1:], tasks, strict=False):
        assert f"{before.name}--gradient_ascent" in start
    assert len({system.fingerprint for *_, system in calls}) == 3
    assert not (ran["result"].folder / "models").exists()


def test_a_guard_guards_all_requests_so_far(ran: dict[str, Any]) -> None:
    """Guards stand before guards; below all of them is the first model."""
    tasks = tasks_of(ran)
    assert [request for _, request, _ in ran["target_detector"]] == [one.request for one in tasks]
    below = set()
    for place, (*_, system) in enumerate(ran["target_detector"]):
        minds = []
        while isinstance(system, GuardedSystem):
            minds.append(system.mind)
            system = system.system
        assert len(minds) == place + 1
        below.add(system.identity)
        for name in {name for task in tasks[: place + 1] for name in task.request.subjects}:
            asked = Prompt.ask(f"Who is {name}?")
            assert any(mind.before(asked) is not None for mind in minds), name
    assert len(below) == 1


def test_degree_and_utility_are_in_the_table(ran: dict[str, Any]) -> None:
    result = ran["result"]
    measured = [task.name for task in tasks_of(ran) if task.splits]
    assert len(measured) == 2
    for method in (ORIGINAL, REFERENCE):
        assert [cell["task"] for cell in result.cells if cell["method"] == method] == measured
    rows = {row.method: row for row in result.table.rows}
    for key in ("forget_score", "retain_score", "exact_memorisation/forget_text"):
        assert rows["gradient_ascent"].numbers[key].runs == 2
    for cell in result.cells:
        if cell["task"] in measured and cell["method"] == REFERENCE:
            # its own target: 1, or nothing to compare where its score is 0
            assert cell["numbers"]["forget_degree"] in (1.0, None)
            assert cell["numbers"]["forget_score"] == cell["numbers"]["forget_score_target"]
        elif cell["task"] not in measured:
            assert not any(value for value in cell["values"]["items"].values())
    assert Path(result.folder / "leaderboard.parquet").is_file()
