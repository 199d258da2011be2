"""Who takes part in a round: drawn from the seed, the phase and the round alone.

Dropping out and being late are simulated here, for questions such as how much of either a run
bears; what really goes wrong at a client is noticed when its answer comes, or does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from delible.component import Config
from delible.train.randomness import generator


class Attendance(Config):
    """How many clients take part, and how reliably."""

    share: float = Field(1.0, gt=0, le=1, description="Share of the clients asked in each round.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Simulated: a client that was asked never answers, with this "
        "probability.",
    )  # fmt: skip
    late: float = Field(
        0.0, ge=0, lt=1, description="Simulated: an answer comes one round late, with this "
        "probability, and is not used.",
    )  # fmt: skip


@dataclass(frozen=True)
class Round:
    """Who is asked in a round, and what becomes of it: three disjoint groups in order of names."""

    answer: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    late: tuple[str, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(sorted((*self.answer, *self.dropped, *self.late)))


def drawn(
    clients: Sequence[str], attendance: Attendance, seed: int, phase: str, number: int
) -> Round:
    """The clients of one round: ceil(share * all) of them, at least one."""
    names = sorted(clients)
    count = min(len(names), max(1, math.ceil(attendance.share * len(names) - 1e-9)))
    order = torch.randperm(len(names), generator=generator(seed, "clients", phase, number))
    asked = sorted(names[place] for place in order[:count].tolist())
    groups: dict[str, list[str]] = {"answer": [], "dropped": [], "late": []}
    for client in asked:
        random = generator(seed, "attendance", phase, number, client)
        gone, slow = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        fate = "dropped" if gone < attendance.dropout else "late" if slow < attendance.late else (
            "answer"
        )  # fmt: skip
        groups[fate].append(client)
    return Round(tuple(groups["answer"]), tuple(groups["dropped"]), tuple(groups["late"]))
