"""Notices a collapse: how likely the model still finds the answers of retain rows.

    watched = - sum over retain answer tokens of log p / number of these tokens     (nats per token)

It is the same quantity whatever the retain loss is made of (a likelihood, a divergence, logits,
hidden states): a loss in other units says nothing about a collapse. A constant that is added to
all logits does not change it. Where the retain loss reads the answers anyway, the step's own rows
are watched, and cost nothing; where it reads hidden states only, a few retain rows are looked at
every so many steps. Without a retain loss nothing is watched but that the numbers are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from delible.lm.lm import LM
from delible.train.passes import nats_of, split
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.step import make_step

#: Nats per token by which retain answers may become less likely before a run counts as collapsed.
COLLAPSE_NATS = 5.0
#: Rows that are watched at once, at least; fewer would say more about the rows than the model.
WATCHED_ROWS = 16
#: Steps between two looks, where the retain loss does not read the answers.
LOOK_STEPS = 10


class CollapseWatch:
    """Compares retain answers with how likely they were before the first step.

    Args:
        rows: The retain rows of the run; none: nothing is watched.
        in_passing: Whether the retain loss reads the answers, so that steps report their own.
        budget: Tokens per pass, asked for at every look.
    """

    def __init__(
        self,
        lm: LM,
        forward: torch.nn.Module,
        rows: Sequence[Row],
        *,
        in_passing: bool,
        budget: Callable[[], int],
    ) -> None:
        self.lm, self.forward, self.in_passing, self.budget = lm, forward, in_passing, budget
        apart = max(1, len(rows) // WATCHED_ROWS)
        self.rows = list(rows[::apart][:WATCHED_ROWS])
        self.enough = min(WATCHED_ROWS, len(rows))
        self.start: float | None = None
        self.now: float | None = None
        self.nats, self.tokens, self.seen = 0.0, 0, 0

    def begin(self, state: dict[str, float] | None) -> None:
        """Looks at the start model, or goes on from a checkpoint."""
        if state:
            self.start, self.now = state["start"], state["now"]
            self.nats, self.tokens, self.seen = (
                state["nats"], int(state["tokens"]), int(state["seen"])
            )  # fmt: skip
        elif self.rows:
            self.start = self.now = self.look()

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        if self.start is None or self.now is None:
            return {}
        return {
            "start": self.start, "now": self.now,
            "nats": self.nats, "tokens": self.tokens, "seen": self.seen,
        }  # fmt: skip

    @torch.no_grad()
    def look(self) -> float:
        """Nats per answer token of the watched rows."""
        nats, tokens = 0.0, 0
        for part in split({}, self.rows, [], [1.0] * len(self.rows), self.budget()):
            step = make_step(
                self.lm, self.forward, {"retain": part.retain}, {"retain": ("answers",)},
                Reference(),
            )  # fmt: skip
            more = nats_of(step.retain, part.retain_weights)
            nats, tokens = nats + more[0], tokens + more[1]
        return nats / max(1, tokens)

    def after(
        self, step: int, nats: float, tokens: int, rows: int, *, last: bool = False
    ) -> str | None:
        """After step ``step`` (from 1): how the run has collapsed, or None.

        Args:
            nats: -log p of the step's retain answers, summed.
            tokens: Their tokens.
            rows: Their rows.
            last: Whether the run ends here.
        """
        if self.start is None:
            return None
        if self.in_passing:
            self.nats, self.tokens, self.seen = (
                self.nats + nats, self.tokens + tokens, self.seen + rows
            )  # fmt: skip
            if self.seen < self.enough or not self.tokens:
                return None
            self.now = self.nats / self.tokens
            self.nats, self.tokens, self.seen = 0.0, 0, 0
        elif step % LOOK_STEPS == 0 or last:
            self.now = self.look()
        else:
            return None
        if math.isfinite(self.now) and self.now <= self.start + COLLAPSE_NATS:
            return None
        return (
            f"retain answers became less likely, from {self.start:.2f} to {self.now:.2f} nats per "
            "token"
        )


def watched_rows(rows: Sequence[Row], used: Collection[int]) -> list[Row]:
    """The retain rows that a run meets, in order."""
    return [rows[index] for index in sorted(used)]
