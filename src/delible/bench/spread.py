"""The same manifests here, on several processes, or on a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

from delible.errors import MissingExtraError, RecipeError
from delible.watching import SECONDS_BETWEEN_LINES

Manifest = dict[str, Any]
#: Cells that must run one after the other (a later one starts from an earlier one's result).
Chain = Sequence[Manifest]
Work = Callable[[Manifest], Manifest]


def run_chain(work: Work, chain: Chain) -> list[Manifest]:
    """The results of a chain, in order."""
    return [work(manifest) for manifest in chain]


def spread(
    work: Work,
    chains: Sequence[Chain],
    *,
    jobs: int = 1,
    ray: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[list[Manifest]]:
    """Results of every chain, as they finish.

    Args:
        work: An importable function of one manifest (plain data in, plain data out).
        chains: What to run; chains are independent of each other.
        jobs: Processes on this machine.
        ray: Use the Ray cluster that is there (or a local one); paths must be shared by its
            machines.
        waiting: Called now and then while other processes work and none has finished.

    Raises:
        RecipeError: Both ``jobs`` and ``ray``.
        MissingExtraError: Ray is not installed.
    """
    if ray and jobs > 1:
        raise RecipeError("give either --jobs or --ray.", hint="Ray decides by itself how many.")
    if ray:
        yield from _on_ray(work, chains, waiting)
    elif jobs > 1:
        # "spawn": a forked process would inherit torch's threads and CUDA's state
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_share_cores, initargs=(jobs,)
        ) as pool:
            running = {pool.submit(run_chain, work, chain) for chain in chains}
            while running:
                done, running = wait(running, SECONDS_BETWEEN_LINES, FIRST_COMPLETED)
                for one in done:
                    yield one.result()
                if not done:
                    waiting()
    else:
        for chain in chains:
            yield run_chain(work, chain)


def _share_cores(jobs: int) -> None:
    """Gives this process its share of the threads; more threads than cores wait for each other."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _on_ray(
    work: Work, chains: Sequence[Chain], waiting: Callable[[], None]
) -> Iterator[list[Manifest]]:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("Spreading runs with --ray", "ray") from None
    if not ray.is_initialized():
        ray.init(ignore_reinit_error=True)
    remote = ray.remote(run_chain)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    running = [remote.options(num_gpus=gpus).remote(work, chain) for chain in chains]
    while running:
        done, running = ray.wait(running, num_returns=1, timeout=SECONDS_BETWEEN_LINES)
        if done:
            yield ray.get(done[0])
        else:
            waiting()
