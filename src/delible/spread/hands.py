"""Pieces of work, done here, by several processes, or on a Ray cluster."""

from __future__ import annotations

import heapq
import importlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delible.errors import MissingExtraError, RecipeError
from delible.spread.pieces import Chain, Hands, Key, Work
from delible.watching import SECONDS_BETWEEN_LINES


class Here:
    """This process: one piece at a time."""

    at_once = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._given: list[tuple[Key, Any]] = []

    def give(self, key: Key, piece: Any) -> None:
        heapq.heappush(self._given, (key, piece))

    def done(self) -> list[tuple[Key, Any]]:
        key, piece = heapq.heappop(self._given)
        return [(key, self._work(piece))]


class Processes:
    """Several processes of this machine."""

    def __init__(self, pool: ProcessPoolExecutor, work: Work, at_once: int) -> None:
        self._pool, self._work, self.at_once = pool, work, at_once
        self._running: dict[Future[Any], Key] = {}

    def give(self, key: Key, piece: Any) -> None:
        self._running[self._pool.submit(self._work, piece)] = key

    def done(self) -> list[tuple[Key, Any]]:
        ended, _ = wait(self._running, SECONDS_BETWEEN_LINES, FIRST_COMPLETED)
        return [(self._running.pop(one), one.result()) for one in ended]


def check_hands(jobs: int, ray: bool, cpus: int | None) -> None:
    """Refuses what makes no sense together, before any work.

    Raises:
        RecipeError: Both ``jobs`` and ``ray``, ``cpus`` without ``ray``, or numbers below one.
        MissingExtraError: Ray is asked for and not installed.
    """
    for name, number in (("jobs", jobs), ("cpus", cpus)):
        if number is not None and number < 1:
            raise RecipeError(f"'{name}' = {number}: give a number from 1 on.")
    if ray and jobs > 1:
        raise RecipeError("give either --jobs or --ray.", hint="Ray decides by itself how many.")
    if cpus is not None and not ray:
        raise RecipeError("--cpus is about a Ray cluster.", hint="Add --ray, or leave it out.")
    if ray:
        check_ray()


def check_ray() -> Any:
    """Ray's own module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("Spreading runs with --ray", "ray") from None


@contextmanager
def hands(
    work: Work,
    *,
    jobs: int = 1,
    ray: bool = False,
    cpus: int | None = None,
    folders: Sequence[Path] = (),
    paths: Sequence[Path] = (),
) -> Iterator[Hands]:
    """Whoever does the work.

    Args:
        work: Does one piece.
        jobs: Processes on this machine.
        ray: Use the Ray cluster that is there, or a local one.
        cpus: CPUs of a piece on a cluster; None: see :func:`delible.spread.machines.share_of`.
        folders: That all machines of a cluster must share: results are handed on there.
        paths: That all of them must see.

    Raises:
        RecipeError: See :func:`check_hands`.
        MissingExtraError: Ray is not installed.
        RunError: The cluster cannot do it; see :class:`delible.spread.cluster.OnRay`.
    """
    check_hands(jobs, ray, cpus)
    if ray:
        from delible.spread.cluster import on_ray

        with on_ray(work, cpus=cpus, folders=folders, paths=paths) as found:
            yield found
    elif jobs > 1:
        # "spawn": a forked process would inherit torch's threads and CUDA's state
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_share_cores, initargs=(jobs,)
        ) as pool:
            try:
                yield Processes(pool, work, jobs)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        yield Here(work)


def spread(
    doing: Hands,
    chains: Sequence[Chain],
    *,
    known: Callable[[Any], Any] = lambda piece: None,
    keep: Callable[[Any, Any], Any] = lambda piece, result: result,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[list[Any]]:
    """Results of every chain, as they finish.

    Args:
        doing: Whoever does the pieces, and nothing else meanwhile.
        chains: What to do; chains are independent of each other.
        known: The result of a piece that was finished before, or None: it is to be done.
        keep: Called as ``keep(piece, result)`` here when a piece has come back; what it returns
            is the result.
        waiting: Called now and then while work goes on elsewhere and nothing has finished.
    """
    found: list[list[Any]] = [[] for _ in chains]
    left: set[int] = set()

    def give(number: int) -> bool:
        """Hands over the next piece of a chain that is not known; whether there is one."""
        chain = chains[number]
        while len(found[number]) < len(chain):
            piece = chain[len(found[number])]
            result = known(piece)
            if result is None:
                doing.give((number, len(found[number])), piece)
                return True
            found[number].append(result)
        return False

    for number in range(len(chains)):
        if give(number):
            left.add(number)
        else:
            yield found[number]
    while left:
        ended = doing.done()
        if not ended:
            waiting()
        for (number, place), result in ended:
            found[number].append(keep(chains[number][place], result))
            if not give(number):
                left.remove(number)
                yield found[number]


def there(names: Sequence[object]) -> list[Path]:
    """Those of some names that are files or folders, which other machines must see too."""
    return [path for path in map(Path, map(str, names)) if path.exists()]


def _share_cores(jobs: int) -> None:
    """Gives this process its share of the threads; more threads than cores wait for each other."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


__all__ = ["Here", "Processes", "check_hands", "hands", "spread", "there"]
