"""Requests that come one after another: each is carried out on the result of the last.

After each of them everything is measured that was asked to be forgotten so far, and what is to be
kept. A request whose records and names were all done before is said to be covered, and nothing is
trained. Whoever is killed starts the same command again: requests that were done are read, the one
that was at work goes on where it was, and the result has the same bits.

No record that any request of the sequence, or one before it, names is ever among those to be kept.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from delible.api import unlearn
from delible.bench.cost import Cost
from delible.bench.table import write_parquet
from delible.component import build
from delible.context import Context
from delible.errors import DataError, DelibleError, RunError
from delible.finishing import chain_of
from delible.loaders import read_records, write_records
from delible.loaders.requests import Holds, Named
from delible.measure.evaluate import evaluate
from delible.measure.starting import started
from delible.method import Method
from delible.preparing import AUTOMATIC_RETAIN, automatic_retain
from delible.records import ForgetRequest, Record, digest
from delible.resolving import resolve_method
from delible.rundir import RunDirectory
from delible.sequence.result import (
    COMMAND,
    REQUESTS,
    RETAIN,
    SequenceResult,
    Step,
    is_sequence,
    read_sequence,
    state_of,
)
from delible.system.base import System
from delible.system.roles import Player
from delible.systems.opening import open_system
from delible.train.processes import refuse_shares
from delible.train.recipe import Recipe, Strength
from delible.watching import Stage, Steps

logger = logging.getLogger(__name__)

#: Records of each request, and of those to be kept, that are asked after every request.
ROWS = 20
METRIC, SAID = "answer_probability", {"name": "outcome", "max_new_tokens": 32}

#: Called after each request with it, the sequence so far and the system.
Look = Callable[[Step, System], None]


def unlearn_sequence(
    model: str,
    requests: Sequence[Named | ForgetRequest],
    *,
    out: Path | str,
    method: str | Method | Recipe | Path = "npo",
    slots: Mapping[str, Any] | None = None,
    strength: Strength | None = None,
    retain: Sequence[Record] = (),
    rows: int = ROWS,
    seed: int = 0,
    verify: bool = True,
    progress: Steps | None = None,
    stage: Stage | None = None,
    roles: Mapping[str, Player] | None = None,
    context: Context | None = None,
    done: Callable[[Step], None] | None = None,
    look: Look | None = None,
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> SequenceResult:
    """Makes a model forget one request after the other.

    Args:
        model: What opens the start: a model, a run, or the folder of an earlier sequence, which
            is continued.
        requests: In order; see :func:`delible.loaders.read_requests`.
        out: The folder of the sequence.
        retain: Records to keep, for requests without their own. None given, and the method needs
            some: the start model's own answers to general questions, for all requests.
        rows: Records of each request, and of those to be kept, that are measured; evenly spaced.
        verify, seed, roles, strength, slots, options: As for :func:`delible.unlearn`.
        done: Called after each request.
        given: What else :func:`delible.unlearn` takes: anchor, refusals, generator.
        look: Called with every step and its system, once, when it is measured.

    Raises:
        DelibleError: Bad input; or a request cannot be carried out, which its message names. What
            was done before stays, and the same call goes on there.
    """
    refuse_shares("a sequence of requests")
    named = _named(requests)
    if is_sequence(Path(model).expanduser()):
        model = state_of(model)
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    context = started(
        context, seed=seed, run=RunDirectory(out), steps=progress, stage=stage, roles=roles
    )
    run = context.run
    assert run is not None
    start = open_system(model, context=context)
    described = {
        "command": COMMAND,
        "model": model,
        "model_fingerprint": start.fingerprint,
        "method": chosen.spec(),
        "seed": context.seed,
        "requests": [[one.id, one.request.id] for one in named],
        "retain": digest(retain),
        "rows": rows,
        "given": {name: getattr(one, "name", one) for name, one in (given or {}).items()},
    }
    if run.begin(described):
        found = read_sequence(run.path)
        return SequenceResult(**{**vars(found), "resumed_finished": True})
    work = _Sequence(run, model, named, chosen, context, rows, verify, look)
    work.given = {name: one for name, one in (given or {}).items() if one is not None}
    work.begin(start, retain)
    del start
    steps = []
    for number in range(1, len(named) + 1):
        steps.append(work.step(number))
        if done is not None:
            done(steps[-1])
    return work.finish()


def _named(requests: Sequence[Named | ForgetRequest]) -> list[Named]:
    """Requests with ids; those without one get their number.

    Raises:
        DataError: There are none, or two have the same id.
    """
    found = [
        one if isinstance(one, Named) else Named(f"{number:03d}", one)
        for number, one in enumerate(requests, start=1)
    ]
    ids = [one.id for one in found]
    if not found:
        raise DataError("there are no requests.", where="requests")
    if len(set(ids)) < len(ids) or RETAIN in ids:
        raise DataError(f"ids of requests are distinct, and not '{RETAIN}'.", where="requests")
    return found


class _Sequence:
    """A sequence at work."""

    def __init__(
        self, run: RunDirectory, model: str, named: Sequence[Named], method: Method,
        context: Context, rows: int, verify: bool, look: Look | None,
    ) -> None:  # fmt: skip
        self.run, self.model, self.named, self.method = run, model, named, method
        self.context, self.rows, self.verify, self.look = context, rows, verify, look
        self.wanted = Holds()
        for one in named:
            self.wanted |= Holds.of(one.request.forget)
        self.before: list[tuple[str, Holds]] = []
        self.retain: tuple[Record, ...] = ()
        self.given: dict[str, Any] = {}

    # ---- the start

    def begin(self, start: System, retain: Sequence[Record]) -> None:
        """What is kept, what was done before, and what the start model knows."""
        self.before = [
            (Path(link.folder).name, _held_by(Path(link.folder))) for link in chain_of(start)
        ]
        for _, holds in self.before:
            self.wanted |= holds
        self.named = [self._without_forgotten(one) for one in self.named]
        self.retain = self._retained(start, retain)
        if Step.load(self.run.path, 0) is None:
            self._measured(Step(0, "", "start", "Nothing was done yet.", self.model), start)

    def _retained(self, start: System, given: Sequence[Record]) -> tuple[Record, ...]:
        path = self.run.path / "data" / "retain.jsonl"
        if path.exists():
            return tuple(read_records(path))
        kept = self._not_forgotten(given)
        if not kept and "retain" in self.method.needs:
            rows = automatic_retain(start, AUTOMATIC_RETAIN, self.context.stage)
            kept = self._not_forgotten(rows)  # type: ignore[arg-type]
        if len(kept) < len(given):
            logger.warning(
                f"{len(given) - len(kept)} records to be kept are forgotten by a request of this "
                "sequence, or by an earlier one: they are left out."
            )
        if kept and self.run.writes:
            write_records(kept, path)
        return kept

    def _not_forgotten(self, records: Sequence[Record]) -> tuple[Record, ...]:
        return tuple(one for one in records if not Holds.of([one]).facts & self.wanted.facts)

    def _without_forgotten(self, one: Named) -> Named:
        """A request whose neighbours are asked to be forgotten by no request."""
        near = self._not_forgotten(one.request.neighbours)
        return replace(one, request=one.request.model_copy(update={"neighbours": near}))

    # ---- one request

    def step(self, number: int) -> Step:
        """Carries out a request, or reads what became of it."""
        one = self.named[number - 1]
        found = Step.load(self.run.path, number)
        self.context.stage(f"request {one.id}", number - 1, len(self.named))
        if found is None:
            found = self._covered(number, one) or self._done(number, one)
            gc.collect()
        self.before.append((one.id, self._holds(number, one)))
        return found

    def _holds(self, number: int, one: Named) -> Holds:
        """What a request holds, with the rows that were asked for where there were only names."""
        return Holds.of((*one.request.forget, *self._rows(number)), one.request.subjects)

    def _covered(self, number: int, one: Named) -> Step | None:
        """A request all of whose records and names were done before."""
        mine = Holds.of(one.request.forget, one.request.subjects)
        names = covering(mine, self.before)
        if not names:
            return None
        told = f"All that it holds was done for {' and '.join(names)}: nothing is trained."
        logger.info(f"Request {one.id}: {told}")
        state = self._state(number)
        return self._measured(
            Step(number, one.id, "covered", told, state, by=names),
            open_system(state, context=self.context),
        )

    def _state(self, number: int) -> str:
        """What the result of the requests before is opened by."""
        before = Step.load(self.run.path, number - 1)
        assert before is not None
        return before.state

    def _done(self, number: int, one: Named) -> Step:
        folder = self._folder(number)
        request = one.request
        if self.retain and not request.retain:
            request = request.model_copy(update={"retain": self.retain})
        elif request.retain:
            request = request.model_copy(update={"retain": self._not_forgotten(request.retain)})
        try:
            with Cost() as cost:
                result = unlearn(
                    self._state(number), request, method=self.method, verify=self.verify,
                    context=replace(self.context, run=RunDirectory(folder)), **self.given,
                )  # fmt: skip
        except DelibleError as error:
            raise RunError(
                f"request {one.id} could not be carried out: {error.problem}",
                where=error.where or str(folder),
                hint=error.hint or "What was done before stays; the same command goes on here.",
            ) from error
        manifest = RunDirectory(folder).manifest
        whole = not result.resumed_finished and not manifest.get("resumed")
        skipped = result.notes.get("skipped")
        told = result.achieved.sentence() if result.achieved is not None else ""
        change = None if result.achieved is None else result.achieved.changes.get("forget")
        step = Step(
            number, one.id, "skipped" if skipped else "done", str(skipped or told), str(folder),
            seconds=manifest["cost"]["seconds"],
            seconds_in_all=round(cost.seconds, 2) if whole else None,
            peak_bytes=cost.peak_bytes if whole else None,
            steps=int(result.notes.get("steps", 0)), tokens=int(result.notes.get("tokens", 0)),
            before=None if change is None or one.request.forget else change.before,
        )  # fmt: skip
        del result
        return self._measured(step, open_system(str(folder), context=self.context))

    def _folder(self, number: int) -> Path:
        return self.run.path / REQUESTS / f"{number:03d}-{self.named[number - 1].id}"

    def _rows(self, number: int) -> tuple[Record, ...]:
        """A request's records; those that were asked for, where it holds names alone."""
        given = self.named[number - 1].request.forget
        path = self._folder(number) / "data" / "forget.jsonl"
        return given or (tuple(read_records(path)) if path.exists() else ())

    # ---- measuring

    def _measured(self, step: Step, system: System) -> Step:
        """The step with what is left of everything so far, kept in the folder."""
        upto = len(self.named) if step.number == 0 else step.number
        splits: dict[str, Sequence[Record]] = {
            self.named[number - 1].id: _spaced(rows, self.rows)
            for number in range(1, upto + 1)
            if (rows := self._rows(number))
        }
        kept = (*self.retain, *(row for one in self.named for row in one.request.neighbours))
        if kept:
            splits[RETAIN] = _spaced(kept, self.rows)
        metric = build("metric", METRIC if "score" in system.capabilities else SAID)
        items = evaluate(system, splits, [metric]).items.get(metric.card.name, {})
        values = {split: [item.value for item in found] for split, found in items.items()}
        step = Step(**{**vars(step), "values": values})
        if self.look is not None:
            self.look(step, system)
        if self.run.writes:
            step.save(self.run.path)
        return step

    def finish(self) -> SequenceResult:
        """Closes the run."""
        found = read_sequence(self.run.path)
        if self.run.writes:
            write_parquet(self.run.path / "sequence.parquet", found.cells())
            told = [
                {"id": one.id, "what": one.what, "state": one.state, "seconds": one.seconds}
                for one in found.steps[1:]
            ]
            seconds = round(sum(one.seconds for one in found.steps), 1)
            self.run.finish(cost={"seconds": seconds}, requests=told, state=found.state)
            self.run.release()
        return found


def covering(mine: Holds, earlier: Sequence[tuple[str, Holds]]) -> list[str]:
    """Names of the earlier requests that together hold all that one holds; empty: they do not.

    The one that holds most of it comes first, and each adds something.
    """
    left, names = mine, list[str]()
    most = sorted(earlier, key=lambda one: -len(one[1].facts & mine.facts))
    for name, holds in most:
        rest = left.without(holds)
        if rest != left:
            names.append(name)
            left = rest
    return names if left == Holds() else []


def _spaced(records: Sequence[Record], count: int) -> list[Record]:
    """At most so many records, evenly spaced."""
    if len(records) <= count:
        return list(records)
    return [records[place * len(records) // count] for place in range(count)]


def _held_by(folder: Path) -> Holds:
    """What an earlier run of the chain was asked to forget."""
    path = folder / "data" / "forget.jsonl"
    rows = read_records(path) if path.exists() else []
    return Holds.of(rows, RunDirectory(folder).manifest.get("run", {}).get("subjects", ()))


__all__ = ["Look", "unlearn_sequence"]
