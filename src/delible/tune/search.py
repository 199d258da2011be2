"""The search: trials of unlearning and measuring, proposed by Optuna's TPE sampler.

    minimise  leak   subject to   utility >= budget

The budget is a constraint of the sampler, so a trial that breaks it is known to be worse than any
that keeps it, whatever its leak. The first trial is the method as it is, so the winner is never
worse (on the records that decide). The next ones move the learning rate alone, which says most:
up while the budget is kept, down while it is broken, then between the two; then the sampler moves
everything. A trial that fails (training collapsed, memory) is recorded with its reason and the
search goes on. Trials are kept in a journal: a killed search goes on with
the trials that are finished, and proposes what it would have proposed, because each proposal
depends on the seed, its number and the finished trials only.

Library: Optuna (arXiv 1907.10902); TPE with constraints as in c-TPE (arXiv 2211.14411).
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.files import atomic_file, write_json
from delible.lm.lm import LM
from delible.measure.starting import started, with_writer
from delible.method import Method
from delible.preparing import AUTOMATIC_RETAIN, automatic_retain
from delible.ranges import Range
from delible.records import ForgetRequest, digest
from delible.resolving import resolve_method
from delible.rundir import RunDirectory
from delible.spread.hands import Processes, check_hands, hands, there
from delible.spread.pieces import Hands, Work
from delible.system.base import System
from delible.system.roles import Player
from delible.systems.opening import open_system
from delible.train import generated as generated_rows
from delible.train.recipe import Recipe
from delible.tune.measuring import ROWS, Means, Parts, cut, leak, measured
from delible.tune.measuring import utility as kept_utility
from delible.tune.results import Trial, TuneResult, winner
from delible.tune.space import Value, space
from delible.tune.study import STARTUP, Study, optuna_or_extra, quiet_optuna
from delible.tune.trying import Trying
from delible.watching import Stage, duration

logger = logging.getLogger(__name__)

TABLE = "trials.json"


def tune(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Method | Recipe | Path = "npo",
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
    jobs: int = 1,
    ray: bool = False,
    cpus: int | None = None,
    context: Context | None = None,
    **options: Any,
) -> TuneResult:
    """Searches a method's options for the least leak that keeps a utility budget.

    Args:
        model: A name for :func:`delible.load`, read anew for every trial, or an :class:`LM`,
            which stays as it is and is copied.
        request: What to forget; see :mod:`delible.tune.measuring` for what is measured on what.
            Without retain records the model's own answers to general questions are kept.
        method: Name of a method of any kind, a YAML file (whose ``tune:`` may give ranges), or
            the method itself.
        trials: How many there will be, finished ones of the same search in ``out`` included.
        utility: Share of the start model's utility to keep, in (0, 1].
        seed: Of the search and of every trial's training.
        out: Folder of the search; the same search goes on there. None keeps nothing on disk.
        slots: Other components for single slots.
        hold: Options that are not searched.
        reference, refusals, generator, generated, roles: As for :func:`delible.unlearn`.
        progress: Called as ``progress(title, done, total)``.
        jobs: Trials at once, each in a process of this machine.
        ray: Trials at once on a Ray cluster: as many as it takes, a quarter of them all at most.
        cpus: CPUs that a trial takes there, beside a GPU where there are GPUs.
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
    check_hands(jobs, ray, cpus)
    optuna = optuna_or_extra()
    chosen = resolve_method(method, slots=slots, options=options)
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
        return search.run(request, trials, run, partial(_hands, jobs=jobs, ray=ray, cpus=cpus))
    finally:
        if run is not None:
            run.release()


def _hands(
    work: Work, given: Sequence[object], *, jobs: int, ray: bool, cpus: int | None
) -> AbstractContextManager[Hands]:
    """Whoever does trials.

    Args:
        given: What other processes open by name.

    Raises:
        RecipeError: A model is given itself, and trials run elsewhere.
    """
    if (jobs > 1 or ray) and any(isinstance(one, LM) for one in given):
        raise RecipeError(
            "a model is given itself.",
            where="ray" if ray else "jobs",
            hint="Give its name or folder: other processes open it.",
        )
    return hands(work, jobs=jobs, ray=ray, cpus=cpus, paths=there(given) if ray else ())


class _Search:
    """One search: its material, its study, its results."""

    def __init__(
        self,
        optuna: Any,
        model: str | LM,
        method: Method,
        ranges: Mapping[str, Range],
        budget: float,
        context: Context,
        given: Mapping[str, Any],
    ) -> None:
        self.optuna, self.model, self.method, self.space = optuna, model, method, ranges
        self.budget, self.context, self.given = budget, context, dict(given)
        self.trying = Trying(model, method, context, self.given)
        self.name = method.name
        self.notes: list[str] = []

    def run(
        self,
        request: ForgetRequest,
        trials: int,
        run: RunDirectory | None,
        opened: Callable[[Work, Sequence[object]], AbstractContextManager[Hands]],
    ) -> TuneResult:
        lm = open_system(self.model) if isinstance(self.model, str) else self.model
        if run is not None:
            run.begin(self._described(lm, request))
            run.lock()  # a finished search may go on with more trials
        with quiet_optuna(self.optuna):
            study = Study(
                self.optuna, {name: self.method.value(name) for name in self.space}, self.space,
                self.budget, self.context.seed, None if run is None else run.path,
            )  # fmt: skip
            done = {trial.index: trial for trial in study.finished()}
            start = run.manifest.get("start") if run is not None else None
            if start is None or any(index not in done for index in range(trials)):
                parts = cut(self._with_retain(lm, request))
                self._note(parts)
                start = measured(
                    lm, parts.splits, partial(self.context.stage, "measuring the start")
                )
                self._check(start)
                name = lm.name
                del lm
                gc.collect()
                if done:
                    logger.info(f"Going on after {len(done)} finished trials.")
                given = [self.model, self.given["reference"], self.given["generated"]]
                with opened(self.trying.work(parts, start), given) as doing:
                    at_once = self._at_once(doing, trials)
                    if run is not None:
                        run.update(start=start, notes=self.notes)
                    self._search(study, doing, at_once, trials, done)
            else:
                name = lm.name
                self.notes = list(run.manifest.get("notes", [])) if run is not None else []
                logger.info(f"All {len(done)} trials are finished already.")
        return self._result(name, start, [done[index] for index in sorted(done)], run)

    def _described(self, lm: System, request: ForgetRequest) -> dict[str, Any]:
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

    def _with_retain(self, lm: System, request: ForgetRequest) -> ForgetRequest:
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

    def _at_once(self, doing: Hands, trials: int) -> int:
        """How many trials are under way at once; said if that is more than one."""
        at_once = min(doing.at_once, trials)
        if not isinstance(doing, Processes):  # a cluster may take all; then nothing is searched
            at_once = min(at_once, max(1, trials // STARTUP))
        if at_once > 1:
            note = (
                f"{at_once} trials were under way at once: each was proposed without the results "
                f"of the {at_once - 1} before it."
            )
            logger.info(note)
            self.notes.append(note)
        return at_once

    def _search(
        self, study: Study, doing: Hands, at_once: int, total: int, done: dict[int, Trial]
    ) -> None:
        """Adds the trials that are missing.

        A trial is begun when all those are done that are ``at_once`` or more before it, and knows
        these results and no others: so what is tried does not depend on who is done first.
        """
        under_way: dict[int, dict[str, Value]] = {}
        while any(index not in done for index in range(total)):
            for index in range(total):
                if index in done or index in under_way:
                    continue
                known = range(index - at_once + 1)
                if len(under_way) == at_once or any(one not in done for one in known):
                    break
                options = study.ask(
                    index,
                    {one: done[one] for one in known},
                    [
                        done[one].options if one in done else under_way[one]
                        for one in range(len(known), index)
                    ],
                )
                under_way[index] = options
                doing.give((index,), (index, total, options))
            ended = doing.done()
            if not ended:
                self.context.stage("trials", len(done), total)
            for (index,), trial in ended:
                study.tell(trial)
                done[index] = trial
                del under_way[index]
                self._tell(trial, total, list(done.values()))

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
        found = TuneResult(
            self.name, model, self.budget, self.space, start, done, best, path,
            shlex.join(words), self.notes,
        )  # fmt: skip
        write_json(run.path / TABLE, [asdict(trial) for trial in done])
        run.finish(best=asdict(best), within_budget=found.within_budget, trials=len(done))
        return found

    def _write(self, found: TuneResult, folder: Path) -> Path:
        """The winner as a file."""
        method = self.trying.method_of(found.best.index, found.best.options)
        content = method.as_file()
        if "name" in content:
            content["name"] = f"{self.name}_tuned"
        path = folder / f"{method.card.kind}.yaml"
        best = found.best
        with atomic_file(path) as handle:
            handle.write(
                f"# Found by delible tune: trial {best.index + 1} of {len(found.trials)}, "
                f"leak {best.leak:.3f} (before: {found.start_leak:.3f}), "
                f"utility {best.utility:.3f} (budget: {found.budget:g}).\n"
            )
            yaml.safe_dump(content, handle, sort_keys=False, allow_unicode=True)
        return path


__all__ = ["tune"]
