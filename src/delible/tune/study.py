"""What to try next: Optuna's study, kept in a journal, and the first trials, which are planned.

Each proposal depends on the seed, its number and the trials that it may know: of several at once
a trial knows the results of those that are that many numbers before it, and the options of the
others. So a search of four at once is the same wherever, and however fast, its trials run.
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
        """The trials with a result, by their number; those that were under way are closed."""
        states = self.optuna.trial.TrialState
        under_way = (states.RUNNING, states.WAITING)  # of a search that was killed
        for one in self.study.get_trials(deepcopy=False, states=under_way):
            if one.state == states.WAITING:
                self.study.ask()
            self.study.tell(one.number, state=states.FAIL)
        return [Trial(**one.user_attrs["result"]) for one in self._kept()]

    def ask(
        self, index: int, done: Mapping[int, Trial], pending: Sequence[Mapping[str, Value]]
    ) -> dict[str, Value]:
        """The options of a trial.

        Args:
            index: Its number.
            done: What may be known of earlier ones, by number.
            pending: Options of those earlier ones whose results may not be known.
        """
        if index == 0:
            return dict(self.own)
        if index < STARTUP:
            given = self._along_rate(list(done.values()), pending)
            if given is not None:
                return given
        return self._sampled(index, done, pending)

    def tell(self, trial: Trial) -> None:
        """Keeps what came of a trial."""
        states = self.optuna.trial.TrialState
        failed = trial.failed is not None
        budget = None if trial.utility is None else self.budget - EPSILON - trial.utility
        self.study.add_trial(
            self.optuna.trial.create_trial(
                state=states.FAIL if failed else states.COMPLETE,
                value=None if failed else trial.leak,
                params=dict(trial.options),
                distributions=self._distributions(),
                user_attrs={"result": asdict(trial)},
                constraints=None if failed or budget is None else {"utility": budget},
            )
        )

    def _kept(self) -> list[Any]:
        """The library's trials with a result, by number."""
        states = self.optuna.trial.TrialState
        found = [
            one
            for one in self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
            if "result" in one.user_attrs
            # not one that an earlier version had begun to keep when it was killed
            and (one.user_attrs["result"]["failed"] is None) == (one.state == states.COMPLETE)
        ]
        return sorted(found, key=lambda one: int(one.user_attrs["result"]["index"]))

    def _sampled(
        self, index: int, done: Mapping[int, Trial], pending: Sequence[Mapping[str, Value]]
    ) -> dict[str, Value]:
        """The sampler's proposal, in a study of its own that knows no more than it may."""
        made = self.optuna
        view = made.create_study(
            direction="minimize",
            sampler=made.samplers.TPESampler(
                n_startup_trials=STARTUP,
                seed=int(identity({"seed": self.seed, "trial": index})[:8], 16),
                constant_liar=True,  # what is under way is taken for bad, so not proposed twice
            ),
        )
        for one in self._kept():
            if one.user_attrs["result"]["index"] in done:
                view.add_trial(one)
        for options in pending:
            view.add_trial(
                made.trial.create_trial(
                    state=made.trial.TrialState.RUNNING,
                    params=dict(options),
                    distributions=self._distributions(),
                )
            )
        asked = view.ask(self._distributions())
        return {name: rounded(asked.params[name], self.space[name]) for name in self.space}

    def _distributions(self) -> dict[str, Any]:
        return {
            name: self._distribution(bounds, self.own[name]) for name, bounds in self.space.items()
        }

    def _along_rate(
        self, done: Sequence[Trial], pending: Sequence[Mapping[str, Value]]
    ) -> dict[str, Value] | None:
        """The method as it is with the next learning rate; None if there is none to try.

        While nothing is known yet of those under way, it goes up and down by turns.
        """
        name = next((key for key in self.own if key.rpartition(".")[2] == "learning_rate"), None)
        if name is None:
            return None
        kept = [float(one.options[name]) for one in done if one.keeps(self.budget)]
        broken = [float(one.options[name]) for one in done if not one.keeps(self.budget)]
        tried = [*kept, *broken, *(float(one[name]) for one in pending)]
        if not done:
            up = len(pending) % 2 == 1
            rate = max(tried) * STRIDE if up else min(tried) / STRIDE
        elif not kept:
            rate = min(broken) / STRIDE
        else:
            above = [rate for rate in broken if rate > max(kept)]
            rate = math.sqrt(max(kept) * min(above)) if above else max(kept) * STRIDE
        bounds = self.space[name]
        rate = rounded(min(max(rate, bounds.low), bounds.high), bounds)
        return None if rate in tried else {**self.own, name: rate}

    def _distribution(self, bounds: Range, value: Value) -> Any:
        made = self.optuna.distributions
        if isinstance(value, int):
            return made.IntDistribution(int(bounds.low), int(bounds.high), log=bounds.log)
        return made.FloatDistribution(bounds.low, bounds.high, log=bounds.log)
