"""What to try next: Optuna's study, kept in a journal, and the first trials, which are planned.

Each proposal depends on the seed, its number and the finished trials only.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from delible.errors import MissingExtraError
from delible.kept import identity
from delible.ranges import Range
from delible.tune.results import EPSILON, Trial
from delible.tune.space import Value, rounded

#: Trials before the sampler learns from them: the method as it is, and other learning rates (random
#: ones where the learning rate is held).
STARTUP = 4
#: Between two learning rates, while all of them keep the budget or all break it.
STRIDE = 10**0.5
JOURNAL = "trials.journal"


def optuna_or_extra() -> Any:
    """Optuna.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise MissingExtraError("delible tune", "tune") from None


@contextmanager
def quiet_optuna(optuna: Any) -> Iterator[None]:
    """Optuna's log and its notes on experimental parts are no business of the user."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(before)


class Study:
    """The trials of a search.

    Args:
        optuna: The library.
        own: Values of the method as it is, by name.
        space: Ranges, by name.
        budget: Share of the utility to keep.
        seed: Of all proposals.
        folder: Where the journal lies; None keeps nothing.
    """

    def __init__(
        self,
        optuna: Any,
        own: Mapping[str, Value],
        space: Mapping[str, Range],
        budget: float,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.optuna, self.own, self.space = optuna, own, space
        self.budget, self.seed = budget, seed
        storage = None
        if folder is not None:
            journal = optuna.storages.journal
            storage = optuna.storages.JournalStorage(
                journal.JournalFileBackend(str(folder / JOURNAL))
            )
        self.study = optuna.create_study(
            study_name="tune", storage=storage, direction="minimize", load_if_exists=True
        )

    def finished(self) -> list[Trial]:
        """The trials with a result; one that was under way when the search was killed is closed."""
        states = self.optuna.trial.TrialState
        for one in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self.study.tell(one.number, state=states.FAIL)
        found = [
            Trial(**one.user_attrs["result"])
            for one in self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
            if "result" in one.user_attrs
            # not one that was killed between its result and its end: it was closed as failed
            if (one.user_attrs["result"]["failed"] is None) == (one.state == states.COMPLETE)
        ]
        return sorted(found, key=lambda trial: trial.index)

    def ask(self, done: Sequence[Trial]) -> tuple[Any, dict[str, Value]]:
        """The next trial and its options; what comes of it is told with :meth:`tell`."""
        index = len(done)
        own = dict(self.own)
        given = own if index == 0 else self._along_rate(own, done) if index < STARTUP else None
        self.study.sampler = self.optuna.samplers.TPESampler(
            n_startup_trials=STARTUP,
            seed=int(identity({"seed": self.seed, "trial": index})[:8], 16),
        )
        waiting = (self.optuna.trial.TrialState.WAITING,)
        if given is not None and not self.study.get_trials(deepcopy=False, states=waiting):
            self.study.enqueue_trial(given)
        asked = self.study.ask({
            name: self._distribution(bounds, own[name]) for name, bounds in self.space.items()
        })  # fmt: skip
        options = given or {
            name: rounded(asked.params[name], self.space[name]) for name in self.space
        }
        return asked, options

    def tell(self, asked: Any, trial: Trial) -> None:
        """Keeps what came of a trial."""
        asked.set_user_attr("result", asdict(trial))
        states = self.optuna.trial.TrialState
        if trial.failed is None:
            assert trial.utility is not None
            asked.set_constraint("utility", self.budget - EPSILON - trial.utility)
            self.study.tell(asked, trial.leak)
        else:
            self.study.tell(asked, state=states.FAIL)

    def _along_rate(
        self, own: Mapping[str, Value], done: Sequence[Trial]
    ) -> dict[str, Value] | None:
        """The method as it is with the next learning rate; None if there is none to try."""
        name = next((key for key in own if key.rpartition(".")[2] == "learning_rate"), None)
        if name is None:
            return None
        kept = [float(one.options[name]) for one in done if one.keeps(self.budget)]
        broken = [float(one.options[name]) for one in done if not one.keeps(self.budget)]
        if not kept:
            rate = min(broken) / STRIDE
        else:
            above = [rate for rate in broken if rate > max(kept)]
            rate = math.sqrt(max(kept) * min(above)) if above else max(kept) * STRIDE
        bounds = self.space[name]
        rate = rounded(min(max(rate, bounds.low), bounds.high), bounds)
        return None if rate in (*kept, *broken) else {**own, name: rate}

    def _distribution(self, bounds: Range, value: Value) -> Any:
        made = self.optuna.distributions
        if isinstance(value, int):
            return made.IntDistribution(int(bounds.low), int(bounds.high), log=bounds.log)
        return made.FloatDistribution(bounds.low, bounds.high, log=bounds.log)
