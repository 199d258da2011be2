"""Pieces of work on a Ray cluster; the only file that knows Ray.

Before any work each machine is looked at: it must run the same versions, and see the same folders.
Then each piece takes one GPU where there are GPUs, and CPUs otherwise. A piece whose machine or
process goes is done again by another; what has come back is never done twice. Ray's own retries
are off, so that each is told and counted here.

Library: Ray (arXiv 1712.05889). What a cluster is, and how machines join one, is its own.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from delible.errors import DelibleError, MissingExtraError, RunError
from delible.files import explain_disk
from delible.kept import cache_folder
from delible.rundir import code_digest, versions
from delible.spread.machines import (
    Machine,
    Share,
    Tries,
    check_same,
    check_shared,
    share_of,
)
from delible.spread.pieces import Key, Work
from delible.watching import SECONDS_BETWEEN_LINES

logger = logging.getLogger(__name__)

#: A machine that does not answer for so long before any work is not there.
LOOKED_AT_SECONDS = 120.0
#: So long a cluster may be without a machine that can take a piece: others may join.
ALONE_SECONDS = 300.0


@contextmanager
def on_ray(
    work: Work,
    *,
    cpus: int | None = None,
    folders: Sequence[Path] = (),
    paths: Sequence[Path] = (),
) -> Iterator[OnRay]:
    """A Ray cluster that works: the one that is there, or a local one for this while.

    Args:
        work: Importable on every machine, or can be pickled.
        cpus: CPUs of each piece.
        folders: That all machines must share; made if they are not there.
        paths: That all of them must see.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: There is no cluster; its machines differ, do not see the folders, or cannot take
            a piece.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("Spreading runs with --ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        try:
            # what workers print is told by their results
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except Exception as error:  # no cluster at an address, another Ray or Python there, …
            raise RunError(
                f"Ray does not start: {' '.join(str(error).split())}",
                where="ray",
                hint="Is the cluster up ('ray status'), with the same Ray and Python?",
            ) from error
    try:
        machines = _machines(ray)
        _look(ray, folders, paths)
        share = share_of(list(machines.values()), cpus)
        _tell(machines.values(), share)
        doing = OnRay(ray, work, share)
        try:
            yield doing
        finally:
            doing.close()
    finally:
        if started:
            ray.shutdown()


class OnRay:
    """A cluster's machines; made by :func:`on_ray`."""

    def __init__(self, ray: Any, work: Work, share: Share) -> None:
        self._ray, self._share = ray, share
        self._work = ray.put(work)
        self._surroundings = str(Path.cwd()), str(cache_folder().absolute())
        self._remote = ray.remote(_done).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0
        )
        self._running: dict[Any, tuple[Key, Any]] = {}
        self._tries = Tries()
        self._alone_since: float | None = None

    @property
    def at_once(self) -> int:
        """How many pieces the machines take at once that are there now."""
        return self._share.at_once(list(_machines(self._ray).values()))

    def give(self, key: Key, piece: Any) -> None:
        self._tries.begin(key)
        reference = self._remote.remote(self._work, piece, self._share.cpus, self._surroundings)
        self._running[reference] = (key, piece)

    def done(self) -> list[tuple[Key, Any]]:
        """See :class:`delible.spread.pieces.Hands`.

        Raises:
            RunError: A piece was lost too often, or no machine is left that could take it.
        """
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=SECONDS_BETWEEN_LINES)
        found: list[tuple[Key, Any]] = []
        for reference in ended:
            key, piece = self._running.pop(reference)
            try:
                worked, result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                # what a piece raises comes back as a result, so it was not even begun
                raise RunError(
                    f"a piece of work cannot be begun there: {_line(error.cause)}",
                    where="ray",
                    hint="Is delible installed on every machine?",
                ) from error
            except self._ray.exceptions.RayError as error:
                self._tries.lost(key, _line(error))
                logger.warning(
                    f"Whoever did a piece of work is gone ({type(error).__name__}): it is done "
                    "elsewhere."
                )
                self.give(key, piece)
                continue
            if not worked:
                raise result
            found.append((key, result))
        if not found:
            self._check_machines()
        return found

    def close(self) -> None:
        """Ends what is under way."""
        for reference in self._running:
            with suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._running.clear()

    def _check_machines(self) -> None:
        """Refuses to wait for ever for machines that are gone."""
        if self.at_once:
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since > ALONE_SECONDS:
            raise RunError(
                f"no machine of the cluster is left that could take a piece ({self._share}).",
                where="ray",
                hint="The same command goes on with what is finished, once there is one.",
            )
        logger.warning("No machine of the cluster is left that could take a piece: waiting.")


# ---- on the machines


def _done(work: Work, piece: Any, cpus: int, surroundings: tuple[str, str]) -> tuple[bool, Any]:
    """One piece, on whichever machine: whether it came to an end, and its result or its error.

    Args:
        surroundings: The folder in which names of files begin, and the cache.
    """
    folder, os.environ["DELIBLE_CACHE"] = surroundings
    with suppress(OSError):  # it is needed by relative names alone, which were looked at
        os.chdir(folder)
    threads = max(1, cpus)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what torch takes when it is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    try:
        return True, work(piece)
    except DelibleError as error:
        return False, error
    except Exception as error:  # it need not be possible to pickle it
        return False, RunError(f"{type(error).__name__}: {error}", where=platform.node())


def _seen(folders: Sequence[str], token: str, paths: Sequence[str]) -> dict[str, Any]:
    """What a machine runs, and which folders and other paths it does not see."""
    unseen = [
        folder
        for folder, name in ((one, Path(one) / token) for one in folders)
        if not name.is_file() or name.read_text(encoding="utf-8") != token
    ]
    unseen += [path for path in paths if not Path(path).exists()]
    return {"runs": _runs(), "unseen": unseen}


def _runs() -> dict[str, str]:
    """Everything that must be the same: versions, and delible's own code."""
    return {**versions(), "delible's code": code_digest()}


# ---- before any work


def _machines(ray: Any) -> dict[str, Machine]:
    """The machines that are alive, by Ray's name for them."""
    found: dict[str, Machine] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has: Mapping[str, float] = node["Resources"]
        kinds = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
        found[node["NodeID"]] = Machine(
            node["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0), ", ".join(kinds)
        )
    return found


def _look(ray: Any, folders: Sequence[Path], paths: Sequence[Path]) -> None:
    """Looks at every machine.

    Raises:
        RunError: One does not answer, runs something else, or does not see a folder.
    """
    strategy = importlib.import_module("ray.util.scheduling_strategies")
    token = f".seen-{uuid4().hex}"
    needed = [one.absolute() for one in (*folders, cache_folder())]
    for folder in needed:
        with explain_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).write_text(token, encoding="utf-8")
    try:
        found: dict[str, dict[str, Any]] = {}
        asked = {}
        for name, machine in _machines(ray).items():
            there = strategy.NodeAffinitySchedulingStrategy(name, soft=False)
            remote = ray.remote(_seen).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            # two nodes of one machine have one address
            title = f"{machine.address} ({name[:6]})"
            asked[title] = remote.remote(
                [str(one) for one in needed], token, [str(one.absolute()) for one in paths]
            )
        for title, reference in asked.items():
            try:
                found[title] = ray.get(reference, timeout=LOOKED_AT_SECONDS)
            except Exception as error:  # of Ray, or of an import there
                raise RunError(
                    f"a machine cannot work: {_line(getattr(error, 'cause', None) or error)}",
                    where=f"ray, {title}",
                    hint="Is delible installed there, in the Python that Ray was started with?",
                ) from error
    finally:
        for folder in needed:
            (folder / token).unlink(missing_ok=True)
    check_same(_runs(), {title: one["runs"] for title, one in found.items()})
    check_shared({title: one["unseen"] for title, one in found.items()})


def _tell(machines: Sequence[Machine] | Any, share: Share) -> None:
    some = list(machines)
    taken = share.at_once(some)
    logger.info(
        f"Ray: {len(some)} machine{'s' * (len(some) != 1)}; each piece of work takes {share}, "
        f"{taken} at once."
    )
    kinds = sorted({one.kind for one in some if share.on(one)})
    if len(kinds) > 1:
        logger.warning(
            f"The machines are of different kinds ({', '.join(kind or 'other' for kind in kinds)}):"
            " their numbers differ by rounding, and seconds cannot be compared."
        )


def _line(error: BaseException | None) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


__all__ = ["OnRay", "on_ray"]
