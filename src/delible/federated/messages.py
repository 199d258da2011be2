"""What a server asks of a client, what comes back, and what is wrong with it, if anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from delible.federated.adapter import Adapter, misfit
from delible.train.randomness import generator

Phase = Literal["learn", "unlearn", "recover", "retrain"]
#: Why an answer is not used.
Reason = Literal["nothing", "error", "late", "stale", "misfit", "not finite", "no rows"]


@dataclass(frozen=True)
class Order:
    """What a client does with its rows.

    Attributes:
        recipe: A recipe as plain data (:meth:`delible.train.recipe.Recipe.spec`); what it says of
            where weights move gives way to the adapter.
        on: Which rows: those to be forgotten (beside what is kept), what is kept, or what is
            learned at first (both).
        proximal: mu of FedProx: 0 is none.
        frozen_a: The factor A stays, so that the mean of the factors is that of the products.
    """

    recipe: Mapping[str, Any]
    on: Literal["forget", "retain", "both"] = "retain"
    proximal: float = 0.0
    frozen_a: bool = False


@dataclass(frozen=True)
class Task:
    """An order in one round of a phase, and the server's adapter."""

    phase: Phase
    round: int
    seed: int
    order: Order
    adapter: Adapter = field(repr=False)

    def seed_of(self, client: str) -> int:
        """The seed of a client's work: another one for each client, phase and round."""
        drawn = generator(self.seed, "client", self.phase, self.round, client)
        return drawn.initial_seed() % 2**31


@dataclass(frozen=True)
class Update:
    """A client's answer.

    Attributes:
        phase, round: Of the task that it answers.
        rows: Rows it trained on, which weigh it.
        adapter: After its work; tensors that it lacks are as the server sent them.
        notes: What its training said, as plain data.
    """

    phase: str
    round: int
    rows: int
    adapter: Adapter = field(repr=False)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that says that it could not do it."""

    problem: str


Answer = Update | Failure | None


@dataclass(frozen=True)
class Holding:
    """How many rows a client has to forget and to keep."""

    forget: int = 0
    retain: int = 0


class Engine(Protocol):
    """Who carries tasks to clients and brings answers back: in this process, or over a network."""

    def holdings(self) -> Mapping[str, Holding]:
        """The clients by name, and what each says it holds."""
        ...

    def work(self, tasks: Mapping[str, Task]) -> Mapping[str, Answer]:
        """Every client's answer to its task; None, or no entry, where none came."""
        ...


def trouble(answer: Answer, task: Task) -> tuple[Reason, str] | None:
    """Why an answer must not be used, in a word and in words; None: it may."""
    if answer is None:
        return "nothing", "it did not answer"
    if isinstance(answer, Failure):
        return "error", f"it could not do it: {answer.problem}"
    if (answer.phase, answer.round) != (task.phase, task.round):
        return "stale", f"it answers {answer.phase} round {answer.round}"
    if not answer.adapter:
        return "nothing", "its adapter is empty"
    if found := misfit(task.adapter, answer.adapter):
        return "misfit", f"its adapter is another one: {found}"
    for name, value in sorted(answer.adapter.items()):
        if not value.is_floating_point():
            return "misfit", f"its adapter is another one: '{name}' holds no fractions"
        if not bool(torch.isfinite(value).all()):
            return "not finite", f"its adapter is no number in '{name}'"
    if answer.rows <= 0:
        return "no rows", f"it says that it trained on {answer.rows} rows"
    return None
