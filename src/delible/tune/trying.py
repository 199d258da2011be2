"""One trial: unlearns with some options and measures; a failure is a result too."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from delible.api import unlearn
from delible.context import Context
from delible.errors import DelibleError, RunError
from delible.lm.lm import LM
from delible.measure.starting import roles_of
from delible.method import Method
from delible.tune.measuring import Means, Parts, leak, measured
from delible.tune.measuring import utility as kept_utility
from delible.tune.results import Trial
from delible.tune.space import Value
from delible.watching import aside


@dataclass
class Trying:
    """What all trials share.

    Attributes:
        model: A name, loaded anew for every trial, or a model, which is copied.
        method: As it was given; what the first trial does.
        given: Further arguments of unlearning.
    """

    model: str | LM
    method: Method
    context: Context
    given: Mapping[str, Any]

    @aside()
    def tried(
        self, index: int, total: int, options: Mapping[str, Value], parts: Parts, start: Means
    ) -> Trial:
        """Unlearns and measures once; a failure is a result too."""
        title = f"trial {index + 1} of {total}"
        began = time.perf_counter()
        stopped = None
        try:
            method = self.method_of(index, options)
            model = self.model if isinstance(self.model, str) else self.model.copy()
            result = unlearn(
                model, parts.request, method=method, shown=0, measured=False,
                context=self._trial_context(title), **self.given,
            )  # fmt: skip
            stopped = result.stopped
            after = measured(
                result.system, parts.splits, partial(self.context.stage, f"{title}: measuring")
            )
        except Exception as error:
            if index == 0 and isinstance(error, DelibleError) and not isinstance(error, RunError):
                raise  # what is wrong with the input is wrong with every trial
            told = (
                str(error)
                if isinstance(error, DelibleError)
                else f"{type(error).__name__}: {error}"
            )
            return Trial(
                index, dict(options), seconds=time.perf_counter() - began,
                failed=" ".join(told.split()),
            )  # fmt: skip
        finally:
            gc.collect()
        left, kept = leak(after), kept_utility(start, after)
        return Trial(
            index,
            dict(options),
            left,
            kept,
            leak(after, aside=True),
            kept_utility(start, after, aside=True),
            dict(after),
            time.perf_counter() - began,
            stopped,
            None if left is not None else "the model gives no finite numbers any more",
        )

    def work(self, parts: Parts, start: Means) -> Callable[[tuple[int, int, Any]], Trial]:
        """Tries ``(index, total, options)``: here with its progress, or anywhere once pickled."""
        return partial(self._piece, parts=parts, start=start)

    def _piece(self, piece: tuple[int, int, Any], *, parts: Parts, start: Means) -> Trial:
        index, total, options = piece
        return self.tried(index, total, options, parts, start)

    def __getstate__(self) -> dict[str, Any]:
        """Of the context only what means something elsewhere: a seed, the cache, roles by name."""
        mine = self.context
        plain = Context(mine.seed, roles=roles_of(mine.roles.named()), cache=mine.cache)
        return {**self.__dict__, "context": plain}

    def method_of(self, index: int, options: Mapping[str, Value]) -> Method:
        """The method of a trial; the first one is as it was given."""
        return self.method if index == 0 else self.method.with_options(options)

    def _trial_context(self, title: str) -> Context:
        """The context of one trial: its steps and stages are told under its title, nothing lies
        in the folder of the search.
        """

        def steps(step: int, total: int, numbers: Mapping[str, float]) -> None:
            self.context.stage(title, step, total)

        def stage(what: str, done: int, total: int) -> None:
            self.context.stage(f"{title}: {what}", done, total)

        return replace(self.context, run=None, steps=steps, stage=stage)
