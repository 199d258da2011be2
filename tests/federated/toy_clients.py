"""Clients that need no model: each adds numbers of its own; some misbehave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from delible.federated.messages import Answer, Failure, Holding, Order, Task, Update

ORDER = Order({"name": "toy"})
START = {"x.lora_A.w": torch.linspace(-1, 1, 6).reshape(2, 3), "x.lora_B.w": torch.zeros(3, 2)}


def honest(client: str, rows: int, task: Task) -> Update:
    """A change that depends on the client, the round and what was sent."""
    random = torch.Generator().manual_seed(task.seed_of(client))
    return Update(
        task.phase, task.round, rows,
        {name: 0.9 * value + 0.1 * torch.randn(value.shape, generator=random)
         for name, value in task.adapter.items()},
        {"rows": rows},
    )  # fmt: skip


def with_tensor(update: Update, change: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    name = next(iter(update.adapter))
    return replace(update, adapter={**update.adapter, name: change(update.adapter[name].clone())})


def spoiled(value: torch.Tensor, number: float) -> torch.Tensor:
    value.view(-1)[3] = number
    return value


#: What goes wrong, and what it is called.
WRONG: dict[str, tuple[str, Callable[[Update], Answer]]] = {
    "nan": ("not finite", lambda one: with_tensor(one, lambda v: spoiled(v, math.nan))),
    "inf": ("not finite", lambda one: with_tensor(one, lambda v: spoiled(v, -math.inf))),
    "shape": ("misfit", lambda one: with_tensor(one, lambda v: v[:1])),
    "foreign": ("misfit", lambda one: replace(one, adapter={**one.adapter, "y": torch.ones(2)})),
    "whole numbers": ("misfit", lambda one: with_tensor(one, lambda v: v.long())),
    "stale": ("stale", lambda one: replace(one, round=one.round - 1)),
    "other phase": ("stale", lambda one: replace(one, phase="learn")),
    "nothing": ("nothing", lambda one: None),
    "empty": ("nothing", lambda one: replace(one, adapter={})),
    "no rows": ("no rows", lambda one: replace(one, rows=0)),
    "says so": ("error", lambda one: Failure("out of memory")),
}


@dataclass
class Toy:
    """An engine of such clients.

    Attributes:
        rows: Of each client.
        wrong: By (client, round): a key of :data:`WRONG`.
    """

    rows: Mapping[str, int] = field(default_factory=lambda: {"a": 1, "b": 2, "c": 5})
    wrong: Mapping[tuple[str, int], str] = field(default_factory=dict)
    before: Callable[[Mapping[str, Task]], Any] = lambda tasks: None
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def holdings(self) -> Mapping[str, Holding]:
        return {name: Holding(0, rows) for name, rows in self.rows.items()}

    def work(self, tasks: Mapping[str, Task]) -> Mapping[str, Answer]:
        self.before(tasks)
        self.asked.append(tuple(sorted(tasks)))
        found: dict[str, Answer] = {}
        for client, task in tasks.items():
            answer = honest(client, self.rows[client], task)
            what = self.wrong.get((client, task.round))
            found[client] = answer if what is None else WRONG[what][1](answer)
        return found
