"""What a search found: its trials, and which of them wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from delible.ranges import Range
from delible.tune.measuring import Means, leak
from delible.tune.space import Value

#: A budget that is missed by less than this is kept (rounding).
EPSILON = 1e-9


@dataclass(frozen=True)
class Trial:
    """One try of a method's options.

    Attributes:
        index: From 0, which is the method as it is.
        options: The searched options, by name.
        leak: On the forget records that decide, in [0, 1]; lower = more is forgotten.
        utility: Share of the start model's utility, in [0, 1]; higher = more is kept.
        aside_leak, aside_utility: The same on records that decide nothing.
        means: Every measure by ``metric/split``.
        stopped: Why training ended early, if it did.
        failed: Why there are no numbers.
    """

    index: int
    options: Mapping[str, Value]
    leak: float | None = None
    utility: float | None = None
    aside_leak: float | None = None
    aside_utility: float | None = None
    means: Means = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str | None = None
    failed: str | None = None

    def keeps(self, budget: float) -> bool:
        """Whether it keeps the utility budget; a failed trial does not."""
        return self.utility is not None and self.utility >= budget - EPSILON


@dataclass(frozen=True)
class TuneResult:
    """What :func:`tune` found.

    Attributes:
        method: Its name; ``model``: that of the start model.
        budget: The utility that was to be kept.
        space: The range of every searched option.
        start: Means of the start model; ``start_leak``: its leak.
        trials: All of them, in order.
        best: The trial of least leak among those that keep the budget; if none does, the one
            with the most utility (then :attr:`within_budget` is false).
        recipe_path: The winner as a file: a recipe, or for an editor its options.
        command: The end of ``delible unlearn MODEL --forget …`` that uses the winner.
        notes: What was special, in sentences.
    """

    method: str
    model: str
    budget: float
    space: Mapping[str, Range]
    start: Means
    trials: Sequence[Trial]
    best: Trial
    recipe_path: Path | None = None
    command: str = ""
    notes: Sequence[str] = ()

    @property
    def best_options(self) -> dict[str, Value]:
        """The winner's searched options, as :func:`delible.unlearn` takes them."""
        return dict(self.best.options)

    @property
    def within_budget(self) -> bool:
        """Whether any trial keeps the budget."""
        return self.best.keeps(self.budget)

    @property
    def start_leak(self) -> float | None:
        return leak(self.start)


def winner(trials: Iterable[Trial], budget: float) -> Trial | None:
    """The least leak within the budget, the earlier of two equals; else the most utility."""
    valued = [trial for trial in trials if trial.failed is None]
    kept = [trial for trial in valued if trial.keeps(budget)]
    if kept:
        return min(kept, key=lambda trial: (trial.leak or 0.0, trial.index))
    return max(valued, key=lambda trial: (trial.utility or 0.0, -trial.index), default=None)
