"""The engine over Flower. Where Flower is not installed (its pins clash with the project's lock)
all of it is skipped; docs/federated.md says how to make an environment for it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_clients import fact, held, plain
from toy_clients import ORDER, START, WRONG, honest

pytest.importorskip(
    "flwr",
    reason="flwr is not installed: its pins clash with requirements.lock. Install "
    "requirements-federated.lock in an environment of its own (docs/federated.md).",
)

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from delible.errors import RunError
from delible.federated import adapter as adapters
from delible.federated.federation import Federation, Run
from delible.federated.flower import wire
from delible.federated.flower.engine import Flower
from delible.federated.in_process import InProcess
from delible.federated.messages import Failure, Holding, Task, Update
from delible.federated.rounds import Rounds
from delible.federated.servers import Server
from delible.federated.starting import dressed
from delible.federated.taking_part import Attendance
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.train.recipe import Recipe

LOOPBACK = Path(__file__).parents[2] / "examples" / "federated" / "loopback.py"


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages know in which run they are made."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Answers at once, as told: one function per node."""

    def __init__(self, nodes: dict[int, Callable[[Message], Message | None]]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        found = []
        for message in messages:
            node = message.metadata.dst_node_id
            reply = self.nodes[node](message)
            if reply is not None:
                found.append(reply)
        return found


def toy(name: str, rows: int, wrong: str | None = None) -> Callable[[Message], Message | None]:
    """A node that adds numbers of its own, over Flower's messages."""

    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return Message(wire.of_holding(name, Holding(0, rows)), reply_to=message)
        if wrong == "breaks down":
            return Message(Error(code=2, reason="no memory"), reply_to=message)
        if wrong == "garbage":
            content = RecordDict({"said": ConfigRecord({"json": "{"})})
            return Message(content, reply_to=message)
        found: Any = honest(name, rows, wire.to_task(message.content))
        if wrong is not None:
            found = WRONG[wrong][1](found)
        return None if found is None else Message(wire.of_answer(found), reply_to=message)

    return answer


def rounds(nodes: Sequence[Callable[[Message], Message | None]]) -> Any:
    engine: Any = Flower(Grid(dict(enumerate(nodes, start=11))), len(nodes))  # type: ignore[arg-type]
    orders = dict.fromkeys(engine.holdings(), ORDER)
    return Rounds(engine, "recover", orders, 1, Server(), Attendance(), 0).run(START)


def test_what_is_sent_comes_in_as_it_was() -> None:
    task = Task("unlearn", 3, 7, ORDER, START)
    found = wire.to_task(wire.of_task(task))
    assert (found.phase, found.round, found.seed, found.order) == ("unlearn", 3, 7, ORDER)
    assert found.adapter.keys() == START.keys()
    assert all(torch.equal(found.adapter[name], START[name]) for name in START)
    update = honest("a", 4, task)
    back = wire.to_answer(wire.of_answer(update))
    assert isinstance(back, Update)
    assert (back.phase, back.round, back.rows, back.notes) == ("unlearn", 3, 4, {"rows": 4})
    assert all(torch.equal(back.adapter[name], update.adapter[name]) for name in START)
    assert wire.to_answer(wire.of_answer(Failure("no"))) == Failure("no")
    assert isinstance(wire.to_answer(RecordDict({"said": ArrayRecord()})), Failure)
    assert wire.to_holding(wire.of_holding("x", Holding(1, 2))) == ("x", Holding(1, 2))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("nan", "not finite"), ("shape", "misfit"), ("stale", "stale"), ("nothing", "nothing"),
     ("empty", "nothing"), ("breaks down", "error"), ("garbage", "error")],
)  # fmt: skip
def test_a_node_that_misbehaves_is_left_out(wrong: str, reason: str) -> None:
    found = rounds([toy("a", 1), toy("b", 2, wrong), toy("c", 5)])
    (entry,) = found.entries
    assert entry.left_out == {"b": reason}
    assert entry.weights == pytest.approx({"a": 1 / 6, "c": 5 / 6})
    assert all(math.isfinite(float(value.sum())) for value in found.adapter.values())


def test_two_nodes_of_one_name_and_too_few_are_refused() -> None:
    with pytest.raises(RunError, match="two nodes say that they are client 'a'"):
        rounds([toy("a", 1), toy("a", 1)])
    engine: Any = Flower(Grid({1: toy("a", 1)}), 2, waiting_seconds=0)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="1 of 2 clients are there"):
        engine.holdings()


def test_a_server_that_was_killed_goes_on_with_its_round(tmp_path: Path) -> None:
    """The same run again: rounds that were done are not asked for."""
    from delible.federated.flower import server

    plain().save(tmp_path / "model")
    asked: list[str] = []

    def counting(node: Callable[[Message], Message | None], dies: int) -> Any:
        def answer(message: Message) -> Message | None:
            if message.metadata.message_type == "train":
                asked.append(message.metadata.group_id)
                if len(asked) == dies:
                    raise KeyboardInterrupt
            return node(message)

        return answer

    def config(out: str) -> dict[str, Any]:
        return {
            "model": str(tmp_path / "model"), "method": "npo", "clients": 2, "seed": 0, "learn": 3,
            "options": '{"aggregation": "fedyogi", "rank": 2}', "timeout": 60,
            "out": str(tmp_path / out),
        }  # fmt: skip

    def serve(out: str, dies: int = 0) -> dict[str, torch.Tensor]:
        asked.clear()
        nodes = {1: counting(toy("a", 1), dies), 2: counting(toy("b", 3), dies)}
        server.run(Grid(nodes), config(out))  # type: ignore[arg-type]
        return load_file(tmp_path / out / "adapter" / "adapter_model.safetensors")

    whole = serve("whole")
    assert sorted(asked) == ["learn-0"] * 2 + ["learn-1"] * 2 + ["learn-2"] * 2
    with pytest.raises(KeyboardInterrupt):
        serve("killed", dies=4)
    again = serve("killed")
    assert sorted(asked) == ["learn-1"] * 2 + ["learn-2"] * 2
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [
    {"aggregation": "fedavg"}, {"aggregation": "fedyogi", "placement": "client", "share": 0.6},
])  # fmt: skip
def test_real_processes_over_loopback_give_the_numbers_of_this_process(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """A SuperLink, three SuperNodes, a ServerApp and ClientApps, each a process of its own."""
    import json

    plain().save(tmp_path / "model")
    clients = held()
    for name, records in clients.items():
        folder = tmp_path / "clients" / name
        folder.mkdir(parents=True)
        for role in ("forget", "retain"):
            if getattr(records, role):
                write_records(getattr(records, role), folder / f"{role}.jsonl")
    given = {"epochs": 1, "batch_size": 4, "learning_rate": 5e-4, "rank": 4, "rounds": 1, **options}
    spec = importlib.util.spec_from_file_location("loopback", LOOPBACK)
    assert spec is not None
    assert spec.loader is not None
    loopback = importlib.util.module_from_spec(spec)
    sys.modules["loopback"] = loopback
    spec.loader.exec_module(loopback)
    said = loopback.federate(
        tmp_path / "clients", tmp_path / "out", tmp_path / "logs", seconds=400,
        model=str(tmp_path / "model"), method="npo_lora", seed=3, options=json.dumps(given),
    )  # fmt: skip
    lm = LM.load(str(tmp_path / "model"))
    settings = Federation(**given)
    dressed(lm, settings.rank, settings.alpha, 3)
    run = Run(InProcess(lm, clients), settings, 3)
    start = adapters.read(lm)
    forgot = run.unlearn(start, Recipe.named("npo_lora"))
    here = run.recover(forgot.adapter)
    there = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    mine = {name.replace(".default", ""): value for name, value in here.adapter.items()}
    assert mine.keys() == there.keys()
    worst = max(float((there[name] - value).abs().max()) for name, value in mine.items())
    moved = max(float((here.adapter[name] - start[name]).abs().max()) for name in start)
    print(f"largest difference {worst:.3g}, largest change {moved:.3g}")
    assert worst <= 1e-4 < moved
    entries = [*forgot.entries, *here.entries]
    assert [entry["asked"] for entry in said["entries"]] == [list(one.asked) for one in entries]
    for one, other in zip(said["entries"], entries, strict=True):
        assert one["weights"] == pytest.approx(dict(other.weights))
        assert (one["bytes_down"], one["bytes_up"]) == (other.bytes_down, other.bytes_up)
    assert said["left_out"] == {}
    # what was written is an artefact like any other
    from delible.systems.opening import open_lm

    opened = open_lm(str(tmp_path / "out"))
    assert opened.wears_adapter
    assert fact(1).question
