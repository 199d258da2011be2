"""Pieces of work here, in processes, and through a stand-in for Ray: each once, in order."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.errors import DelibleError, MissingExtraError, RecipeError, RunError
from delible.spread.hands import check_hands, hands, spread
from delible.spread.machines import TRIES


def twice(piece: dict[str, Any]) -> dict[str, Any]:
    return {"value": 2 * piece["value"]}


CHAINS = [[{"value": 1}, {"value": 2}], [{"value": 3}], []]
RESULTS = [[], [{"value": 2}, {"value": 4}], [{"value": 6}]]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_chains_here_and_in_processes(jobs: int) -> None:
    with hands(twice, jobs=jobs) as doing:
        assert doing.at_once == jobs
        assert sorted(spread(doing, CHAINS), key=str) == sorted(RESULTS, key=str)


def test_here_a_chain_ends_before_the_next_begins() -> None:
    order: list[int] = []

    def work(piece: int) -> int:
        order.append(piece)
        return -piece

    with hands(work) as doing:
        assert list(spread(doing, [[1, 2], [3, 4]])) == [[-1, -2], [-3, -4]]
    assert order == [1, 2, 3, 4]


def test_what_is_known_is_not_done_again_and_what_comes_back_is_kept() -> None:
    kept = {1: -1, 3: -3}
    done: list[int] = []

    def work(piece: int) -> int:
        done.append(piece)
        return -piece

    def keep(piece: int, result: int) -> int:
        kept[piece] = result
        return result

    chains = [[1, 2], [3], [4]]
    wanted = [[-1, -2], [-3], [-4]]
    for _ in range(2):
        with hands(work) as doing:
            assert sorted(spread(doing, chains, known=kept.get, keep=keep)) == sorted(wanted)
        assert done == [2, 4]
    assert kept == {1: -1, 2: -2, 3: -3, 4: -4}


def test_what_goes_wrong_there_is_told_here() -> None:
    def work(piece: int) -> int:
        raise RunError("it is broken.")

    with hands(work) as doing, pytest.raises(RunError, match="it is broken"):
        list(spread(doing, [[1]]))


@pytest.mark.parametrize(
    "error",
    [
        RunError("broken.", where="here", hint="Mend it."),
        RecipeError("unknown."),
        MissingExtraError("spreading", "ray"),
    ],
)
def test_errors_come_from_other_processes_as_they_are(error: DelibleError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.problem, again.where, again.hint) == (error.problem, error.where, error.hint)


def threads(piece: Any) -> int:
    return torch.get_num_threads()


@pytest.mark.slow
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what each process would take
    with hands(threads, jobs=2) as doing:
        assert list(spread(doing, [[{}]])) == [[1]]


@pytest.mark.parametrize(
    ("jobs", "ray", "cpus", "said"),
    [
        (2, True, None, "either --jobs or --ray"),
        (1, False, 2, "--cpus is about a Ray cluster"),
        (0, False, None, "'jobs' = 0"),
        (1, True, 0, "'cpus' = 0"),
    ],
)
def test_what_makes_no_sense_is_refused(jobs: int, ray: bool, cpus: int | None, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_hands(jobs, ray, cpus)


# ---- through a stand-in for Ray


class GoneError(Exception):
    """A machine that died."""


class TaskError(GoneError):
    """Ray's error for a task that raised, or could not be read there."""

    cause = ModuleNotFoundError("No module named 'delible'")


class Node:
    """A machine of the stand-in."""

    def __init__(self, name: str, cpus: float, gpus: float = 0, kind: str = "") -> None:
        self.name, self.cpus, self.gpus, self.kind, self.alive = name, cpus, gpus, kind, True
        self.versions: dict[str, str] = {}
        self.sees = True

    def row(self) -> dict[str, Any]:
        kind = {f"accelerator_type:{self.kind}": 1.0} if self.kind else {}
        return {
            "NodeID": self.name, "Alive": self.alive, "NodeManagerAddress": self.name,
            "Resources": {"CPU": self.cpus, "GPU": self.gpus, **kind},
        }  # fmt: skip


class Ray:
    """Ray's interface, one task at a time, with machines that may die under a task."""

    def __init__(self, *nodes: Node) -> None:
        self.machines = list(nodes)
        self.loses: dict[Any, int] = {}
        self.ran: list[tuple[Any, dict[str, Any]]] = []
        self.cancelled: list[Any] = []
        self.up = self.down = False
        self.exceptions = types.SimpleNamespace(RayError=GoneError, RayTaskError=TaskError)

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.down = True

    def nodes(self) -> list[dict[str, Any]]:
        return [one.row() for one in self.machines]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Any) -> Any:
        class Remote:
            def __init__(self, how: dict[str, Any]) -> None:
                self.how = how

            def options(self, **how: Any) -> Remote:
                return Remote(how)

            def remote(self, *given: Any) -> Any:
                return _Reference((function, given), self.how)

        return Remote({})

    def wait(
        self, some: list[Any], num_returns: int, timeout: float
    ) -> tuple[list[Any], list[Any]]:
        assert len(set(map(id, some))) == len(some)
        if not any(one.alive for one in self.machines):
            return [], some
        return some[:num_returns], some[num_returns:]

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        function, given = reference.task
        there = reference.how.get("scheduling_strategy")
        if there is not None:  # a look at one machine
            node = next(one for one in self.machines if one.name == there)
            found = function(*given)
            found["runs"] = {**found["runs"], **node.versions}
            return found if node.sees else {**found, "unseen": [given[0][0]]}
        piece = given[1]
        key = str(piece)
        if self.loses.get(key, 0):
            self.loses[key] -= 1
            raise GoneError("the node died")
        self.ran.append((piece, reference.how))
        return function(*given)

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled.append(reference)


class _Reference:
    def __init__(self, task: Any, how: dict[str, Any]) -> None:
        self.task, self.how = task, how


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ray]:
    made = Ray(Node("a", 4), Node("b", 4))
    strategies: Any = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda name, soft: name
    monkeypatch.setitem(sys.modules, "ray", made)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray.util", types.ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    count, folder = torch.get_num_threads(), Path.cwd()
    yield made
    os.chdir(folder)
    torch.set_num_threads(count)


def looked_at(**given: Any) -> None:
    """A cluster that is opened, and does nothing."""
    with hands(twice, ray=True, **given):
        pass


def test_a_cluster_gets_the_same_pieces(ray: Ray, tmp_path: Path) -> None:
    with hands(twice, ray=True, folders=[tmp_path / "out"]) as doing:
        assert doing.at_once == 2
        assert sorted(spread(doing, CHAINS), key=str) == sorted(RESULTS, key=str)
    assert {(how["num_cpus"], how["num_gpus"], how["max_retries"]) for _, how in ray.ran} == {
        (4, 0, 0)
    }
    assert (ray.up, ray.down, ray.cancelled) == (True, True, [])
    assert not list((tmp_path / "out").iterdir()), "what machines were to see is taken away"


def test_a_piece_takes_a_gpu_where_there_are_some(ray: Ray) -> None:
    ray.machines = [Node("head", 8), Node("b", 16, 2, "H200"), Node("c", 8, 1, "L4")]
    with hands(twice, ray=True) as doing:
        assert doing.at_once == 3
        list(spread(doing, CHAINS))
    assert {(how["num_cpus"], how["num_gpus"]) for _, how in ray.ran} == {(8, 1)}


def test_what_is_lost_with_a_machine_is_done_again_and_nothing_else(
    ray: Ray, caplog: pytest.LogCaptureFixture
) -> None:
    ray.loses = {str({"value": 2}): 1, str({"value": 3}): TRIES - 1}
    with hands(twice, ray=True) as doing:
        assert sorted(spread(doing, CHAINS), key=str) == sorted(RESULTS, key=str)
    assert sorted(piece["value"] for piece, _ in ray.ran) == [1, 2, 3]
    assert sum("it is done elsewhere" in line for line in caplog.messages) == TRIES


def test_a_piece_that_is_always_lost_ends_the_work(ray: Ray) -> None:
    ray.loses = {str({"value": value}): TRIES for value in (1, 3)}
    with (
        pytest.raises(RunError, match=f"lost {TRIES} times.*the node died"),
        hands(twice, ray=True) as doing,
    ):
        list(spread(doing, CHAINS))
    assert ray.cancelled, "what else was under way is ended"
    assert ray.down


def test_machines_without_delible_are_told(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any, **__: Any) -> Any:
        raise TaskError

    monkeypatch.setattr(ray, "get", unreadable)
    with pytest.raises(RunError, match=r"ray, a \(a\).*cannot work.*No module named 'delible'"):
        looked_at()


def test_other_versions_and_unshared_folders_are_refused(ray: Ray, tmp_path: Path) -> None:
    ray.machines[1].versions = {"torch": "1.0", "delible's code": "abc"}
    with pytest.raises(RunError, match=r"code is \w+ here, abc on b \(b\); torch is .* 1\.0 on b"):
        looked_at()
    ray.machines[1].versions = {}
    with pytest.raises(RunError, match=r"does not see .*none\."):
        looked_at(paths=[tmp_path, tmp_path / "none"])
    ray.machines[0].sees = False
    with pytest.raises(RunError, match=r"a \(a\) does not see .*out\."):
        looked_at(folders=[tmp_path / "out"])
    assert not ray.ran
    assert not list((tmp_path / "out").iterdir())


def test_it_does_not_wait_for_ever_for_machines_that_are_gone(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("delible.spread.cluster.time.monotonic", lambda: now[0])
    waited: list[float] = []

    def waiting() -> None:
        waited.append(now[0])
        now[0] += 100

    def alone() -> None:
        with hands(twice, ray=True) as doing:
            for one in ray.machines:
                one.alive = False
            now[0] = 1.0
            list(spread(doing, CHAINS, waiting=waiting))

    with pytest.raises(RunError, match=r"no machine .* is left .*goes on with what is finished"):
        alone()
    assert waited == [1, 101, 201, 301]
    assert sum("waiting" in line for line in caplog.messages) == 4


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[ray\]'"):
        looked_at()


def test_without_ray_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for it hears so before data are read or a model is measured."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[ray\]'"):
        check_hands(1, True, None)
    check_hands(2, False, None)
