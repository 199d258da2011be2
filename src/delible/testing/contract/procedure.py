"""Procedures: stages that are declared, and that go on after any kill to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from delible.lm.lm import LM
from delible.method import Outcome
from delible.rundir import RunDirectory
from delible.stages.folder import stages_of
from delible.stages.procedure import Procedure
from delible.system.base import identity_of
from delible.testing.contract.trial import REQUEST, Trial, require, require_same, weights

#: Places at which a run is killed, spread over all that it tells of its progress.
KILLS = 5


class Killed(BaseException):
    """Nobody but the check catches it."""


def stages_are_declared(trial: Trial) -> None:
    """It says what its stages do (others are refused when they begin); its numbers are finite."""
    procedure = cast(Procedure, trial.component)
    require(procedure.stages, "it declares no stages")
    require(all(procedure.stages.values()), "a stage says not what it does")
    outcome = procedure.apply(trial.lm(), REQUEST, trial.context)
    require(outcome.notes["stages"], "it does no stage")
    numbers = [value for step in outcome.history for value in step.values()]
    require(all(math.isfinite(value) for value in numbers), "a step has a number that is not one")


def killed_anywhere_it_goes_on_to_the_same_bits(trial: Trial) -> None:
    """Killed at some points, the same call ends where one that was not killed does."""
    told: list[str] = []
    whole, run = _run(trial, trial.folder / "whole", told.append)
    require(told, "it tells nothing of its progress")
    wanted = _known(whole)
    stages = [one["name"] for one in stages_of(run)]
    require(stages, "no stage stands in the manifest")
    for place in sorted({round(len(told) * part / KILLS) for part in range(KILLS)}):
        folder, count = trial.folder / f"killed-{place}", 0

        def die(_: str, place: int = place) -> None:
            nonlocal count
            count += 1
            if count == place + 1:
                raise Killed

        try:
            _run(trial, folder, die)
        except Killed:
            before = _ended(folder)
            again, after = _run(trial, folder, lambda _: None)
        else:
            continue  # it told less this time, which the comparison below would not explain
        at = told[min(place, len(told) - 1)]
        redone = [
            name for name, when in before.items()
            if RunDirectory(after.path / "stages" / name).manifest["ended"] != when[0]
            or len(RunDirectory(after.path / "stages" / name).manifest["resumed"]) != when[1]
        ]  # fmt: skip
        require(not redone, f"killed at '{at}', stages that had ended were done again: {redone}")
        require(
            [one["name"] for one in stages_of(after)] == stages, f"killed at '{at}', other stages"
        )
        _require_same(wanted, _known(again), f"killed at '{at}', it ends elsewhere")


def _run(trial: Trial, folder: Path, tell: Callable[[str], None]) -> tuple[Outcome, RunDirectory]:
    run = RunDirectory(folder)
    run.begin({"command": "contract"})
    context = replace(
        trial.context,
        run=run,
        steps=lambda step, total, numbers: tell(f"step {step}"),
        stage=lambda title, done, total: tell(title),
    )
    try:
        outcome = cast(Procedure, trial.component).apply(trial.lm(), REQUEST, context)
    finally:
        run.release()
    return outcome, run


def _ended(folder: Path) -> dict[str, tuple[Any, int]]:
    """When each stage that has ended did, and how often it was begun again."""
    manifests = {one.name: RunDirectory(one).manifest for one in folder.glob("stages/*")}
    return {
        name: (found["ended"], len(found["resumed"]))
        for name, found in manifests.items()
        if found.get("status") == "done"
    }


def _known(outcome: Outcome) -> tuple[Any, ...]:
    lm = outcome.system if isinstance(outcome.system, LM) else None
    remembers = None if outcome.remembers is None else outcome.remembers.digest
    return identity_of(outcome.system), outcome.kind, remembers, weights(lm) if lm else {}


def _require_same(wanted: tuple[Any, ...], found: tuple[Any, ...], problem: str) -> None:
    require_same(wanted[-1], found[-1], problem)
    require(wanted[:-1] == found[:-1], problem)
