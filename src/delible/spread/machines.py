"""What the machines of a cluster can take, whether they run the same, and what goes with one.

Plain functions of plain data; :mod:`delible.spread.cluster` asks the machines.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from delible.errors import RunError

#: CPUs of a piece of work where there are no GPUs, if the machines have as many.
CPUS = 4
#: How often a piece is begun whose worker or machine goes each time.
TRIES = 3


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster.

    Attributes:
        address: For people.
        cpus, gpus: That the cluster was told it has.
        kind: Its accelerator or processor.
    """

    address: str
    cpus: float
    gpus: float = 0
    kind: str = ""


@dataclass(frozen=True)
class Share:
    """What one piece of work takes of a machine; on it nobody else uses that meanwhile."""

    cpus: int
    gpus: int

    def on(self, machine: Machine) -> int:
        """How many pieces a machine takes at once."""
        counts = [
            int(there // wanted)
            for there, wanted in ((machine.cpus, self.cpus), (machine.gpus, self.gpus))
            if wanted
        ]
        return min(counts, default=0)

    def at_once(self, machines: Sequence[Machine]) -> int:
        """How many pieces all machines take at once."""
        return sum(map(self.on, machines))

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU{'s' * (self.cpus != 1)}"


def share_of(machines: Sequence[Machine], cpus: int | None = None) -> Share:
    """What each piece takes: one GPU where there are GPUs, otherwise CPUs alone.

    Args:
        cpus: CPUs of a piece; None: beside a GPU its share of the machine's, otherwise
            :data:`CPUS`, or all that the smallest machine has.

    Raises:
        RunError: No machine can take a piece.
    """
    holders = [one for one in machines if one.gpus >= 1]
    gpus = 1 if holders else 0
    if cpus is not None:
        chosen = cpus
    elif holders:
        chosen = min(int(one.cpus // one.gpus) for one in holders)
    else:
        chosen = min([CPUS, *(int(one.cpus) for one in machines if one.cpus >= 1)])
    share = Share(chosen, gpus)
    if not share.at_once(machines):
        told = "; ".join(f"{one.address}: {one.cpus:g} CPUs, {one.gpus:g} GPUs" for one in machines)
        raise RunError(
            f"no machine of the cluster can take a piece of work ({share}).",
            where="ray",
            hint=f"Give fewer CPUs (--cpus), or add machines. There are: {told or 'none'}.",
        )
    return share


def check_same(mine: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> None:
    """Refuses machines that run other versions than this one.

    Args:
        mine: Versions by package.
        theirs: The same, by machine.

    Raises:
        RunError: Names every package that differs, and where.
    """
    differing = []
    for name in sorted({*mine, *(name for one in theirs.values() for name in one)}):
        here = mine.get(name, "none")
        others = {
            address: one.get(name, "none")
            for address, one in theirs.items()
            if one.get(name, "none") != here
        }
        if others:
            told = ", ".join(f"{found} on {address}" for address, found in others.items())
            differing.append(f"{name} is {here} here, {told}")
    if differing:
        raise RunError(
            f"the machines do not run the same: {'; '.join(differing)}.",
            where="ray",
            hint="Numbers of different versions are not compared. Install the same everywhere, "
            "and start Ray again on the machines that change.",
        )


def check_shared(unseen: Mapping[str, Sequence[str]]) -> None:
    """Refuses machines that do not see a folder in which work is handed on.

    Args:
        unseen: By machine, the folders that it does not see.

    Raises:
        RunError: Names them.
    """
    told = [f"{address} does not see {', '.join(some)}" for address, some in unseen.items() if some]
    if told:
        raise RunError(
            f"{'; '.join(told)}.",
            where="ray",
            hint="Results (--out) and the cache (DELIBLE_CACHE) must lie on a file system that all "
            "machines share, under the same path.",
        )


@dataclass
class Tries:
    """How often each piece was begun; what is lost with its machine is begun again."""

    most: int = TRIES
    begun: dict[Hashable, int] = field(default_factory=dict)

    def begin(self, key: Hashable) -> None:
        """A piece is given to somebody."""
        self.begun[key] = self.begun.get(key, 0) + 1

    def lost(self, key: Hashable, why: str) -> None:
        """Whoever did it is gone; it may be begun again.

        Raises:
            RunError: That happened too often: it is the piece, not the machines.
        """
        if self.begun[key] >= self.most:
            raise RunError(
                f"a piece of work was lost {self.most} times with whoever did it (last: {why}).",
                where="ray",
                hint="If memory ran out, give a piece more CPUs (--cpus), so that fewer share a "
                "machine. The same command goes on with what is finished.",
            )


__all__ = ["Machine", "Share", "Tries", "check_same", "check_shared", "share_of"]
