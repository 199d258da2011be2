"""Rounds: who is asked, what comes back, what is left out, and the server's next adapter.

It knows no network and no model: an engine carries tasks and answers. A round that is done is
kept, whole; a killed run goes on with the round that was not, to the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from delible.errors import RunError
from delible.federated.adapter import Adapter, bytes_of
from delible.federated.messages import (
    Answer,
    Engine,
    Order,
    Phase,
    Task,
    Update,
    trouble,
)
from delible.federated.servers import Moments, Server, shares, update
from delible.federated.taking_part import Attendance, Round, drawn
from delible.made import Made
from delible.watching import Stage, unwatched

logger = logging.getLogger(__name__)

#: Looks at the server's adapter after a round, and says numbers.
Look = Callable[[Adapter], Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One round, as it is told.

    Attributes:
        weights: Of the clients whose answers were used.
        left_out: Reason (in a word) by client.
        bytes_down, bytes_up: What the adapters weighed that were sent, and that came back.
        change: Norm of what the round did to the server's adapter.
        clients: What the training of each client said.
        seen: What a look at the model after it said.
    """

    phase: str
    round: int
    asked: tuple[str, ...]
    weights: Mapping[str, float]
    left_out: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    change: float
    clients: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where the rounds of a phase are.

    Attributes:
        late: Clients whose answer to the round before is still on its way.
    """

    adapter: Adapter
    moments: Moments = field(default_factory=Moments)
    entries: tuple[Entry, ...] = ()
    late: tuple[str, ...] = ()

    def made(self) -> Made:
        """All of it, as it is kept."""
        groups = {"adapter": self.adapter, "first": self.moments.first,
                  "second": self.moments.second}  # fmt: skip
        tensors = {
            f"{group}/{name}": value
            for group, adapter in groups.items()
            for name, value in adapter.items()
        }
        said = {
            "rounds": self.moments.rounds,
            "late": list(self.late),
            "entries": [asdict(entry) for entry in self.entries],
        }
        return Made(said, tensors)

    @classmethod
    def of(cls, made: Made) -> Progress:
        """What was kept."""
        groups: dict[str, dict[str, Tensor]] = {"adapter": {}, "first": {}, "second": {}}
        for joined, value in made.tensors.items():
            group, _, name = joined.partition("/")
            groups[group][name] = value
        entries = tuple(Entry(**{**one, "asked": tuple(one["asked"])}) for one in made["entries"])
        moments = Moments(made["rounds"], groups["first"], groups["second"])
        return cls(groups["adapter"], moments, entries, tuple(made["late"]))


#: Makes the next round, or reads back the one that was made: (phase, number from 0, work).
Keeping = Callable[[Phase, int, Callable[[], Progress]], Progress]


def unkept(phase: Phase, number: int, make: Callable[[], Progress]) -> Progress:
    """Keeps nothing."""
    return make()


@dataclass(frozen=True)
class Folder:
    """Keeps the last round of each phase in a folder.

    Attributes:
        identity: Of the run, so that another run's rounds are not taken for it.
    """

    path: Path
    identity: str = ""

    def __call__(self, phase: Phase, number: int, make: Callable[[], Progress]) -> Progress:
        """The round, made now unless it, or a later one, was made before.

        Raises:
            RunError: What was kept cannot be read, or is another run's.
        """
        folder = self.path / phase
        found = Made.load(folder) if folder.exists() else None
        if found is not None:
            if found["identity"] != self.identity:
                raise RunError(
                    "the rounds that were kept belong to another run.", where=str(folder),
                    hint="Choose another folder, or delete this one.",
                )  # fmt: skip
            kept = Progress.of(found)
            if len(kept.entries) > number:
                if len(kept.entries) == number + 1:
                    logger.info(f"{phase}: going on after round {number + 1}.")
                return kept
        progress = make()
        made = progress.made()
        Made({**made.data, "identity": self.identity}, made.tensors).save(folder)
        return progress


@dataclass(frozen=True)
class Rounds:
    """Rounds of one phase.

    Attributes:
        orders: What each client that may be asked does.
        count: How many.
        required: Clients without whose answer a round means nothing.
        one_by_one: Round k asks the k-th client alone, and its adapter is the server's next one.
        seed: Of the run.
        keeping: Keeps rounds that are done, and reads them back.
        look: Asked after each round, and kept with it.
    """

    engine: Engine
    phase: Phase
    orders: Mapping[str, Order]
    count: int
    server: Server
    attendance: Attendance
    seed: int
    required: tuple[str, ...] = ()
    one_by_one: bool = False
    keeping: Keeping = unkept
    look: Look | None = None
    stage: Stage = unwatched

    def run(self, start: Adapter) -> Progress:
        """All rounds that are not done yet.

        Raises:
            RunError: There is nobody to ask, or what was kept is another run's.
        """
        if not self.orders and self.count:
            raise RunError(f"{self.phase}: no client holds rows for it.")
        progress = Progress(dict(start))
        for number in range(self.count):
            if len(progress.entries) > number:
                continue
            self.stage(f"{self.phase}, round {number + 1}", number, self.count)
            progress = self.keeping(self.phase, number, partial(self._round, progress, number))
        return progress

    def _round(self, before: Progress, number: int) -> Progress:
        clients = sorted(self.orders)
        going = (
            Round((clients[number],))
            if self.one_by_one
            else drawn(clients, self.attendance, self.seed, self.phase, number)
        )
        tasks = {
            client: Task(self.phase, number, self.seed, self.orders[client], before.adapter)
            for client in going.asked
        }
        answers = self.engine.work({client: tasks[client] for client in going.answer})
        used, left_out, words = sorted_out(tasks, answers, going)
        for client in before.late:  # what was late for the round before comes in now
            left_out.setdefault(client, "stale")
            words.setdefault(client, f"it answers {self.phase} round {number - 1}")
        tell(self.phase, number, words)
        for client in sorted({*self.required} & {*words}):
            raise RunError(
                f"{self.phase}: nothing is done without client '{client}', and {words[client]}.",
                hint="Run the same command again when it can answer.",
            )
        weights = shares({client: one.rows for client, one in used.items()}) if used else {}
        after, moments = dict(before.adapter), before.moments
        if used:
            adapters = {client: one.adapter for client, one in used.items()}
            server = Server() if self.one_by_one else self.server
            after, moments = update(server, before.adapter, adapters, weights, moments)
        else:
            logger.warning(
                f"{self.phase}, round {number + 1}: nobody's answer can be used; the adapter "
                "stays as it was."
            )
        entry = Entry(
            self.phase, number, going.asked, weights, left_out,
            bytes_down=bytes_of(before.adapter) * len(going.asked),
            bytes_up=sum(bytes_of(one.adapter) for one in answers.values()
                         if isinstance(one, Update))
            + bytes_of(before.adapter) * len(before.late),
            change=distance(before.adapter, after),
            clients={client: dict(one.notes) for client, one in used.items()},
            seen={} if self.look is None else dict(self.look(after)),
        )  # fmt: skip
        return Progress(after, moments, (*before.entries, entry), going.late)


def sorted_out(
    tasks: Mapping[str, Task], answers: Mapping[str, Answer], going: Round
) -> tuple[dict[str, Update], dict[str, str], dict[str, str]]:
    """The answers that can be used; why others cannot, in a word and in words, by client.

    What nobody was asked for is not looked at.
    """
    used: dict[str, Update] = {}
    left_out: dict[str, str] = {}
    words: dict[str, str] = {}
    for client in going.asked:
        if client in going.late:
            left_out[client], words[client] = "late", "its answer is late"
            continue
        answer = None if client in going.dropped else answers.get(client)
        found = trouble(answer, tasks[client])
        if found is not None:
            left_out[client], words[client] = found
        elif isinstance(answer, Update):
            used[client] = answer
    return used, left_out, words


def tell(phase: str, number: int, words: Mapping[str, str]) -> None:
    """Says who is left out of a round, and why."""
    for client, why in sorted(words.items()):
        logger.warning(f"{phase}, round {number + 1}: client '{client}' is left out: {why}.")


def distance(before: Adapter, after: Adapter) -> float:
    """Norm of the difference of two adapters."""
    squares = [
        float((after[name].double() - value.double()).square().sum())
        for name, value in before.items()
    ]
    return float(sum(squares)) ** 0.5


def counted(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a run says of its rounds: bytes, and who was left out how often and why."""
    left_out: dict[str, dict[str, int]] = {}
    for entry in entries:
        for client, reason in entry.left_out.items():
            mine = left_out.setdefault(client, {})
            mine[reason] = mine.get(reason, 0) + 1
    return {
        "rounds": len(entries),
        "bytes_down": sum(entry.bytes_down for entry in entries),
        "bytes_up": sum(entry.bytes_up for entry in entries),
        "left_out": left_out,
        "left_out_in_all": sum(sum(mine.values()) for mine in left_out.values()),
    }
