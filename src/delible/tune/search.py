"""The search: trials of unlearning and measuring, proposed by Optuna's TPE sampler.

    minimise  leak   subject to   utility >= budget

The budget is a constraint of the sampler, so a trial that breaks it is known to be worse than any
that keeps it, whatever its leak. The first trial is the method as it is, so the winner is never
worse (on the records that decide). The next ones move the learning rate alone, which says most:
up while the budget is kept, down while it is broken, then between the two; then the sampler moves
everything. A trial that fails (training collapsed, memory) is recorded
with its reason and the search goes on. Trials are kept in a journal: a killed search goes on with
the trials that are finished, and proposes what it would have proposed, because each proposal
depends on the seed, its number and the finished trials only.

Library: Optuna (arXiv 1907.10902); TPE with constraints as in c-TPE (arXiv 2211.14411).
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from delible.api import AUTOMATIC_RETAIN, automatic_retain, resolve_method, unlearn
from delible.context import Context
from delible.edit.base import Editor
from delible.errors import DelibleError, MissingExtraError, RecipeError, RunError
from delible.files import atomic_file, read_json, write_json
from delible.lm.embedded import cache_folder
from delible.lm.lm import LM
from delible.measure.starting import roles_of, started, with_writer
from delible.records import ForgetRequest, digest
from delible.rundir import RunDirectory, identity
from delible.system.roles import Player
from delible.train import generated as generated_rows
from delible.train.recipe import Range, Recipe
from delible.tune.measuring import ROWS, Means, Parts, cut, leak, measured
from delible.tune.measuring import utility as kept_utility
from delible.tune.space import Value, rounded, space, value_of
from delible.watching import Stage, aside, duration

logger = logging.getLogger(__name__)

#: Trials before the sampler learns from them: the method as it is, and other learning rates (random
#: ones where the learning rate is held).
STARTUP = 4
#: Between two learning rates, while all of them keep the budget or all break it.
STRIDE = 10**0.5
JOURNAL = "trials.journal"
TABLE = "trials.json"
#: Seed of :func:`tuned_options`: none of those that a benchmark reports.
TUNING_SEED = 20_240
#: A budget that is missed by less than this is kept (rounding).
_EPSILON = 1e-9


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
        return self.utility is not None and self.utility >= budget - _EPSILON


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


def tune(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Recipe | Editor | Path = "npo",
    trials: int = 20,
    utility: float = 0.95,
    seed: int = 0,
    out: Path | str | None = None,
    slots: Mapping[str, Any] | None = None,
    hold: Iterable[str] = (),
    reference: str | LM | None = None,
    refusals: Sequence[str] | None = None,
    generator: str | None = None,
    generated: Path | str | None = None,
    progress: Stage | None = None,
    roles: Mapping[str, Player] | None = None,
    context: Context | None = None,
    **options: Any,
) -> TuneResult:
    """Searches a method's options for the least leak that keeps a utility budget.

    Args:
        model: A name for :func:`delible.load`, read anew for every trial, or an :class:`LM`,
            which stays as it is and is copied.
        request: What to forget; see :mod:`delible.tune.measuring` for what is measured on what.
            Without retain records the model's own answers to general questions are kept.
        method: Name of a recipe or an editor, a YAML file (whose ``tune:`` may give ranges), or
            the recipe or editor itself.
        trials: How many there will be, finished ones of the same search in ``out`` included.
        utility: Share of the start model's utility to keep, in (0, 1].
        seed: Of the search and of every trial's training.
        out: Folder of the search; the same search goes on there. None keeps nothing on disk.
        slots: Other components for single slots.
        hold: Options that are not searched.
        reference, refusals, generator, generated, roles: As for :func:`delible.unlearn`.
        progress: Called as ``progress(title, done, total)``.
        context: All of out, seed, progress and roles, made before; instead of them.
        options: Options by name; they are held.

    Raises:
        MissingExtraError: Optuna is not installed.
        RecipeError: Nothing to search, or a number out of range.
        DataError: Records that cannot be measured.
        RunError: Every trial failed, or ``out`` holds another search.
    """
    if trials < 1:
        raise RecipeError(f"trials = {trials}: there must be one at least.", where="tune")
    if not 0 < utility <= 1:
        raise RecipeError(
            f"utility = {utility:g} is not in (0, 1].",
            where="tune",
            hint="It is the share of the start model's utility to keep, such as 0.95.",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a search runs in one process.", where="tune", hint="Start it without a launcher."
        )
    optuna = _optuna()
    chosen = _resolved(method, slots, options)
    ranges = space(chosen, {*hold, *options})
    context = started(
        context, seed=seed, run=None if out is None else RunDirectory(out), stage=progress,
        roles=with_writer(roles, generator),
    )  # fmt: skip
    search = _Search(
        optuna, model, chosen, ranges, utility, context,
        {"reference": reference, "refusals": refusals, "generated": generated},
    )  # fmt: skip
    run = context.run
    try:
        return search.run(request, trials, run)
    finally:
        if run is not None:
            run.release()


def tuned_options(
    start: str,
    request: ForgetRequest,
    method: str,
    trials: int,
    options: Mapping[str, Any],
    roles: Mapping[str, Player] | None = None,
) -> dict[str, Any]:
    """A benchmark's options for a method, with those that a search found for it.

    What is given is held, so that every method has the same budget; only the learning rate is
    searched even then, around the given one. The result is kept in the user's cache, by the
    weights, the records, the method and the options.

    Args:
        start: Name or folder of the model that is to forget.
        options, roles: Of :func:`delible.unlearn`.

    Returns:
        Options of :func:`delible.unlearn`.

    Raises:
        DelibleError: As for :func:`tune`.
    """
    from filelock import FileLock

    _optuna()  # told before a model is loaded
    chosen = _resolved(method, None, options)
    lm = LM.load(start)
    described = {
        "model": lm.fingerprint,
        "request": identity(request.model_dump(mode="json")),
        "method": chosen.spec(),
        "hold": sorted(options),
        "trials": trials,
        "seed": TUNING_SEED,
        "rows": ROWS,
        **({"roles": roles_of(roles).named()} if roles else {}),
    }
    del lm
    gc.collect()
    folder = cache_folder() / "tune" / identity(described)[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the other seeds of the method wait for this search
        kept = folder / "options.json"
        if not kept.exists():
            hold = [name for name in options if name.rpartition(".")[2] != "learning_rate"]
            found = tune(
                start,
                request,
                method=chosen,
                trials=trials,
                seed=TUNING_SEED,
                out=folder,
                hold=hold,
                roles=roles,
            )
            write_json(kept, found.best_options)
        best: dict[str, Any] = read_json(kept)

    def full(name: str) -> str:
        return chosen.place_of(name) if isinstance(chosen, Recipe) else name

    return {**{key: value for key, value in options.items() if full(key) not in best}, **best}


# ---- parts of tune


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise MissingExtraError("delible tune", "tune") from None


def _resolved(
    method: str | Recipe | Editor | Path,
    slots: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Recipe | Editor:
    if isinstance(method, Editor):
        if slots:
            raise RecipeError("a closed-form editor has no slots.", where=method.card.name)
        return type(method).build(method.card.name, **{**dict(method), **options})
    return resolve_method(method, slots=dict(slots or {}), options=dict(options))


def changed(method: Recipe | Editor, options: Mapping[str, Value]) -> Recipe | Editor:
    """The method with the searched options set."""
    if isinstance(method, Recipe):
        return method.changed({}, dict(options))
    return type(method).build(method.card.name, **{**dict(method), **options})


@contextmanager
def _quiet_optuna(optuna: Any) -> Iterator[None]:
    """Optuna's log and its notes on experimental parts are no business of the user."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(before)


class _Search:
    """One search: its material, its study, its results."""

    def __init__(
        self,
        optuna: Any,
        model: str | LM,
        method: Recipe | Editor,
        ranges: Mapping[str, Range],
        budget: float,
        context: Context,
        given: Mapping[str, Any],
    ) -> None:
        self.optuna, self.model, self.method, self.space = optuna, model, method, ranges
        self.budget, self.context, self.given = budget, context, dict(given)
        self.name = str(method.spec()["name"])
        self.notes: list[str] = []

    def run(self, request: ForgetRequest, trials: int, run: RunDirectory | None) -> TuneResult:
        lm = self.model if isinstance(self.model, LM) else LM.load(self.model)
        if run is not None:
            run.begin(self._described(lm, request))
            run.lock()  # a finished search may go on with more trials
        with _quiet_optuna(self.optuna):
            study = self._study(run)
            done = self._finished(study)
            start = run.manifest.get("start") if run is not None else None
            if start is None or len(done) < trials:
                parts = cut(self._with_retain(lm, request))
                self._note(parts)
                start = measured(
                    lm, parts.splits, partial(self.context.stage, "measuring the start")
                )
                self._check(start)
                if run is not None:
                    run.update(start=start, notes=self.notes)
                name = lm.name
                del lm
                gc.collect()
                if done:
                    logger.info(f"Going on after {len(done)} finished trials.")
                while len(done) < trials:
                    done.append(self._trial(study, len(done), trials, parts, start, done))
            else:
                name = lm.name
                self.notes = list(run.manifest.get("notes", [])) if run is not None else []
                logger.info(f"All {len(done)} trials are finished already.")
        return self._result(name, start, done, run)

    def _described(self, lm: LM, request: ForgetRequest) -> dict[str, Any]:
        """Everything that determines a trial; not how many there are, so that more can follow."""
        given = dict(self.given)
        if isinstance(given["reference"], LM):
            given["reference"] = given["reference"].name
        if given["generated"] is not None:
            rows = generated_rows.read(Path(given["generated"]))
            given["generated"] = generated_rows.described(rows)
        return {
            "command": "tune",
            "model": lm.name,
            "model_fingerprint": lm.fingerprint,
            "method": self.method.spec(),
            "space": {name: one.model_dump() for name, one in self.space.items()},
            "utility": self.budget,
            "seed": self.context.seed,
            "rows": ROWS,
            "subjects": list(request.subjects),
            **given,
            "generator": self.context.roles.named().get("writer"),
            "data": {
                name: {"records": len(records), "sha256": digest(records)}
                for name in ("forget", "retain", "neighbours", "holdout")
                for records in [getattr(request, name)]
            },
        }

    def _with_retain(self, lm: LM, request: ForgetRequest) -> ForgetRequest:
        if request.retain or request.neighbours:
            return request
        self.notes.append(
            "No retain records were given: the utility is measured on the model's own answers to "
            "general questions."
        )
        retain = automatic_retain(lm, AUTOMATIC_RETAIN, self.context.stage)
        return request.model_copy(update={"retain": retain})

    def _note(self, parts: Parts) -> None:
        for name in parts.shared:
            self.notes.append(f"There is one record in '{name}': it is trained on and measured.")

    def _check(self, start: Means) -> None:
        if leak(start) is None or kept_utility(start, start) is None:
            raise RunError(
                "the start model has no value on the forget or on the retain records, so nothing "
                "can be compared with it.",
                where="tune",
                hint="Ask with records that have answers, on a model that knows some.",
            )

    # ---- the study

    def _study(self, run: RunDirectory | None) -> Any:
        storage = None
        if run is not None:
            journal = self.optuna.storages.journal
            storage = self.optuna.storages.JournalStorage(
                journal.JournalFileBackend(str(run.path / JOURNAL))
            )
        return self.optuna.create_study(
            study_name="tune", storage=storage, direction="minimize", load_if_exists=True
        )

    def _finished(self, study: Any) -> list[Trial]:
        """The trials with a result; one that was under way when the search was killed is closed."""
        states = self.optuna.trial.TrialState
        for one in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            study.tell(one.number, state=states.FAIL)
        found = [
            Trial(**one.user_attrs["result"])
            for one in study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
            if "result" in one.user_attrs
            # not one that was killed between its result and its end: it was closed as failed
            if (one.user_attrs["result"]["failed"] is None) == (one.state == states.COMPLETE)
        ]
        return sorted(found, key=lambda trial: trial.index)

    def _trial(
        self, study: Any, index: int, total: int, parts: Parts, start: Means, done: list[Trial]
    ) -> Trial:
        own = {name: value_of(self.method, name) for name in self.space}
        given = own if index == 0 else self._along_rate(own, done) if index < STARTUP else None
        study.sampler = self.optuna.samplers.TPESampler(
            n_startup_trials=STARTUP,
            seed=int(identity({"seed": self.context.seed, "trial": index})[:8], 16),
        )
        waiting = (self.optuna.trial.TrialState.WAITING,)
        if given is not None and not study.get_trials(deepcopy=False, states=waiting):
            study.enqueue_trial(given)
        asked = study.ask({
            name: self._distribution(bounds, own[name]) for name, bounds in self.space.items()
        })  # fmt: skip
        options = given or {
            name: rounded(asked.params[name], self.space[name]) for name in self.space
        }
        trial = self._tried(index, total, options, parts, start)
        asked.set_user_attr("result", asdict(trial))
        states = self.optuna.trial.TrialState
        if trial.failed is None:
            assert trial.utility is not None
            asked.set_constraint("utility", self.budget - _EPSILON - trial.utility)
            study.tell(asked, trial.leak)
        else:
            study.tell(asked, state=states.FAIL)
        self._tell(trial, total, [*done, trial])
        return trial

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

    @aside()
    def _tried(
        self, index: int, total: int, options: Mapping[str, Value], parts: Parts, start: Means
    ) -> Trial:
        """Unlearns and measures once; a failure is a result too."""
        title = f"trial {index + 1} of {total}"
        began = time.perf_counter()
        stopped = None
        try:
            method = self._method(index, options)
            call: dict[str, Any] = {"method": method}
            if isinstance(method, Editor):
                call = {**method.spec()}
                call["method"] = call.pop("name")
            model = self.model if isinstance(self.model, str) else self.model.copy()
            result = unlearn(
                model, parts.request, shown=0, measured=False, context=self._trial_context(title),
                **self.given, **call,
            )  # fmt: skip
            stopped = result.stopped
            after = measured(
                result.model, parts.splits, partial(self.context.stage, f"{title}: measuring")
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

    def _method(self, index: int, options: Mapping[str, Value]) -> Recipe | Editor:
        """The method of a trial; the first one is as it was given."""
        return self.method if index == 0 else changed(self.method, options)

    def _trial_context(self, title: str) -> Context:
        """The context of one trial: its steps and stages are told under its title, nothing lies
        in the folder of the search.
        """

        def steps(step: int, total: int, numbers: Mapping[str, float]) -> None:
            self.context.stage(title, step, total)

        def stage(what: str, done: int, total: int) -> None:
            self.context.stage(f"{title}: {what}", done, total)

        return replace(self.context, run=None, steps=steps, stage=stage)

    def _tell(self, trial: Trial, total: int, done: Sequence[Trial]) -> None:
        what = f"trial {trial.index + 1} of {total}"
        seconds = sum(one.seconds for one in done) / len(done) * (total - len(done))
        left = f" ({duration(seconds)} left)" if total > len(done) else ""
        if trial.failed is not None:
            logger.warning(f"{what}: failed: {trial.failed}{left}")
            return
        verdict = "" if trial.keeps(self.budget) else f", below the budget of {self.budget:g}"
        best = winner(done, self.budget)
        leads = "; the best so far" if best == trial and trial.keeps(self.budget) else ""
        logger.info(
            f"{what}: leak {trial.leak:.3f}, utility {trial.utility:.3f}{verdict}{leads}{left}"
        )

    # ---- the result

    def _result(
        self, model: str, start: Means, done: Sequence[Trial], run: RunDirectory | None
    ) -> TuneResult:
        best = winner(done, self.budget)
        if best is None:
            raise RunError(
                f"all {len(done)} trials failed; the first: {done[0].failed}",
                where=f"method '{self.name}'",
            )
        found = TuneResult(
            self.name, model, self.budget, self.space, start, done, best, notes=self.notes
        )
        if run is None:
            return found
        path = self._write(found, run.path)
        words = ["--method", str(path)]
        if isinstance(self.method, Editor):
            words = ["--method", self.name]
            for name, value in best.options.items():
                words += [f"--{name.replace('_', '-')}", repr(value)]
        found = TuneResult(
            self.name, model, self.budget, self.space, start, done, best, path,
            shlex.join(words), self.notes,
        )  # fmt: skip
        write_json(run.path / TABLE, [asdict(trial) for trial in done])
        run.finish(best=asdict(best), within_budget=found.within_budget, trials=len(done))
        return found

    def _write(self, found: TuneResult, folder: Path) -> Path:
        """The winner as a file."""
        method = self._method(found.best.index, found.best.options)
        spec = method.spec()
        kind = "recipe" if isinstance(method, Recipe) else "editor"
        content = {**spec, "name": f"{self.name}_tuned"} if kind == "recipe" else {kind: spec}
        path = folder / f"{kind}.yaml"
        best = found.best
        with atomic_file(path) as handle:
            handle.write(
                f"# Found by delible tune: trial {best.index + 1} of {len(found.trials)}, "
                f"leak {best.leak:.3f} (before: {found.start_leak:.3f}), "
                f"utility {best.utility:.3f} (budget: {found.budget:g}).\n"
            )
            yaml.safe_dump(content, handle, sort_keys=False, allow_unicode=True)
        return path


def winner(trials: Iterable[Trial], budget: float) -> Trial | None:
    """The least leak within the budget, the earlier of two equals; else the most utility."""
    valued = [trial for trial in trials if trial.failed is None]
    kept = [trial for trial in valued if trial.keeps(budget)]
    if kept:
        return min(kept, key=lambda trial: (trial.leak or 0.0, trial.index))
    return max(valued, key=lambda trial: (trial.utility or 0.0, -trial.index), default=None)


__all__ = ["Trial", "TuneResult", "changed", "tune", "tuned_options", "winner"]
