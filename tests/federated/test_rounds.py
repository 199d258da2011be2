"""Rounds: what is used, what is left out and said, bytes, and going on after a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_clients import ORDER, START, WRONG, Toy, honest

from delible.errors import RunError
from delible.federated.adapter import bytes_of
from delible.federated.messages import Task
from delible.federated.rounds import Folder, Progress, Rounds, counted
from delible.federated.servers import Server
from delible.federated.taking_part import Attendance, drawn
from delible.made import Made


def rounds(engine: Toy, count: int = 3, **changes: Any) -> Rounds:
    given: dict[str, Any] = {
        "server": Server(), "attendance": Attendance(), "seed": 0,
        "orders": dict.fromkeys(engine.rows, ORDER), **changes,
    }  # fmt: skip
    return Rounds(engine, "recover", count=count, **given)


def same(left: Progress, right: Progress) -> bool:
    pairs = [
        (left.adapter, right.adapter), (left.moments.first, right.moments.first),
        (left.moments.second, right.moments.second),
    ]  # fmt: skip
    return left.entries == right.entries and all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in pairs
    )


def test_a_round_by_hand() -> None:
    found = rounds(Toy(), 1).run(START)
    task = Task("recover", 0, 0, ORDER, START)
    for name, value in found.adapter.items():
        expected = sum(
            rows / 8 * honest(client, rows, task).adapter[name].double()
            for client, rows in {"a": 1, "b": 2, "c": 5}.items()
        )
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=0)
    assert found.entries[0].weights == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8})


def test_only_adapters_travel_and_their_bytes_are_counted() -> None:
    found = counted(rounds(Toy(), 3).run(START).entries)
    adapter = 4 * (6 + 6)
    assert bytes_of(START) == adapter
    assert found["bytes_down"] + found["bytes_up"] == 3 * 2 * 3 * adapter
    assert found["bytes_down"] == found["bytes_up"]


@pytest.mark.parametrize("what", WRONG)
def test_a_client_that_misbehaves_is_left_out_counted_and_told(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    reason = WRONG[what][0]
    found = rounds(Toy(wrong={("b", 0): what}), 2).run(START)
    first, second = found.entries
    assert first.left_out == {"b": reason}
    assert second.left_out == {}
    assert first.weights == pytest.approx({"a": 1 / 6, "c": 5 / 6})
    # as if it had not been there, in that round
    task = Task("recover", 0, 0, ORDER, START)
    alone = rounds(Toy({"a": 1, "c": 5}), 1).run(START)
    other = rounds(Toy(wrong={("b", 0): what}), 1).run(START)
    assert all(torch.equal(alone.adapter[name], other.adapter[name]) for name in START)
    assert all(bool(torch.isfinite(value).all()) for value in found.adapter.values())
    assert counted(found.entries)["left_out"] == {"b": {reason: 1}}
    assert counted(found.entries)["left_out_in_all"] == 1
    told = [one for one in caplog.messages if "client 'b' is left out" in one]
    assert len(told) == 2
    assert "round 1" in told[0]
    assert task.seed_of("a") != task.seed_of("b")


def test_nobody_answers() -> None:
    wrong = {(client, 0): "nothing" for client in "abc"}
    found = rounds(Toy(wrong=wrong), 1).run(START)
    assert all(torch.equal(found.adapter[name], START[name]) for name in START)
    assert len(found.entries[0].left_out) == 3
    assert found.entries[0].bytes_up == 0
    assert found.moments.rounds == 0


def test_drop_outs_are_sent_to_and_not_heard_of() -> None:
    engine = Toy()
    found = rounds(engine, 12, attendance=Attendance(dropout=0.5)).run(START)
    said = counted(found.entries)
    dropped = sum(one["nothing"] for one in said["left_out"].values())
    assert 5 <= dropped <= 31
    assert said["bytes_down"] == 12 * 3 * bytes_of(START)
    assert said["bytes_up"] == (36 - dropped) * bytes_of(START)
    assert sum(map(len, engine.asked)) == 36 - dropped


def test_a_late_answer_is_not_used_and_comes_in_stale() -> None:
    attendance = Attendance(late=0.4)
    found = rounds(Toy(), 12, attendance=attendance).run(START)
    goings = [drawn(["a", "b", "c"], attendance, 0, "recover", number) for number in range(12)]
    assert any(going.late for going in goings)
    for number, (entry, going) in enumerate(zip(found.entries, goings, strict=True)):
        before = goings[number - 1].late if number else ()
        assert set(entry.weights) == set(going.answer)
        assert {one for one, why in entry.left_out.items() if why == "late"} == {*going.late}
        # what was late for the round before comes in now, if its client is not late again
        stale = {one for one, why in entry.left_out.items() if why == "stale"}
        assert stale == {*before} - {*going.late}
        assert entry.bytes_up == bytes_of(START) * (len(going.answer) + len(before))


def test_one_by_one_the_adapter_is_handed_over() -> None:
    found = rounds(Toy(), 3, one_by_one=True, server=Server(aggregation="fedadam")).run(START)
    at = START
    for number, client in enumerate("abc"):
        at = dict(honest(client, 1, Task("recover", number, 0, ORDER, at)).adapter)
    assert all(torch.equal(found.adapter[name], at[name]) for name in START)
    assert [entry.asked for entry in found.entries] == [("a",), ("b",), ("c",)]


def test_without_a_client_that_is_required_nothing_is_done() -> None:
    engine = Toy(wrong={("b", 0): "nan"})
    with pytest.raises(RunError, match="without client 'b'"):
        rounds(engine, 1, required=("b",)).run(START)
    rounds(Toy(wrong={("a", 0): "nan"}), 1, required=("b",)).run(START)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a process in its work")
@pytest.mark.parametrize("aggregation", ["fedavg", "fedyogi"])
@pytest.mark.parametrize("killed_in", [0, 1, 3])
def test_killed_in_any_round_it_goes_on_to_the_same_bits(
    tmp_path: Path, aggregation: str, killed_in: int
) -> None:
    options: dict[str, Any] = {
        "server": Server(aggregation=aggregation), "attendance": Attendance(late=0.3),
    }  # fmt: skip
    whole = rounds(Toy(), 4, **options).run(START)

    def kill(tasks: Any) -> None:
        if any(task.round == killed_in for task in tasks.values()):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        rounds(Toy(before=kill), 4, keeping=Folder(tmp_path), **options).run(START)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    engine = Toy()
    found = rounds(engine, 4, keeping=Folder(tmp_path), **options).run(START)
    assert same(found, whole)
    assert len(engine.asked) == 4 - killed_in  # what was done is not done again
    again = Toy()
    assert same(rounds(again, 4, keeping=Folder(tmp_path), **options).run(START), whole)
    assert not again.asked


def test_other_rounds_are_not_taken_for_these(tmp_path: Path) -> None:
    rounds(Toy(), 1, keeping=Folder(tmp_path, "one")).run(START)
    with pytest.raises(RunError, match="belong to another run"):
        rounds(Toy(), 1, keeping=Folder(tmp_path, "two")).run(START)
    (tmp_path / "recover" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match="cannot be read"):
        rounds(Toy(), 1, keeping=Folder(tmp_path, "one")).run(START)


def test_a_look_after_each_round_is_kept(tmp_path: Path) -> None:
    looks: list[float] = []

    def look(adapter: Any) -> dict[str, float]:
        looks.append(float(next(iter(adapter.values())).sum()))
        return {"sum": looks[-1]}

    found = rounds(Toy(), 3, keeping=Folder(tmp_path), look=look).run(START)
    assert [entry.seen for entry in found.entries] == [{"sum": one} for one in looks]
    kept = Progress.of(Made.load(tmp_path / "recover"))
    assert kept.entries == found.entries


def test_nobody_holds_rows() -> None:
    with pytest.raises(RunError, match="no client holds rows"):
        rounds(Toy({}), 1).run(START)
