"""A procedure at work: its stages, each resumable on its own, with a manifest, progress and cost.

A stage that has ended is read back and not done again; one that was interrupted goes on from what
it kept. What a stage returns is always what it saved, so a run that was killed continues with the
same bits as one that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from delible.context import Context
from delible.errors import RecipeError
from delible.kept import identity
from delible.lm.lm import LM, language_model
from delible.made import Made, remembered
from delible.precision import Precision
from delible.records import ForgetRequest, RecordBase, digest
from delible.rundir import OtherRunError
from delible.stages import trained
from delible.stages.folder import StageFolder, stages_of
from delible.stages.trained import Trained
from delible.system.base import System, identity_of
from delible.train.engine import Trainer
from delible.train.method import records_of
from delible.train.processes import refuse_shares
from delible.train.randomness import generator
from delible.train.recipe import Recipe

logger = logging.getLogger(__name__)


class Staged(Protocol):
    """What a procedure is to its work (:class:`delible.stages.procedure.Procedure`)."""

    @property
    def name(self) -> str: ...

    @property
    def stages(self) -> Mapping[str, str]: ...

    def spec(self) -> dict[str, Any]: ...


@dataclass
class Stage:
    """One stage while it is at work.

    Attributes:
        name: Of the stage; of a part of it, with its number.
        context: Of the run, with the stage's folder as the run's.
        steps, tokens: What it has spent; add to them.
    """

    name: str
    context: Context
    steps: int = 0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def generator(self, *purpose: object) -> torch.Generator:
        """Random numbers of this stage alone, for a purpose."""
        return generator(self.context.seed, self.name, *purpose)

    def progress(self, done: int, total: int) -> None:
        """Tells how far the stage is."""
        self.context.stage(self.name, done, total)

    def save(self, partial: Made) -> None:
        """Keeps where the stage is; whoever is killed afterwards goes on from there.

        Call it with all that the rest depends on: weights, an optimiser's moments, the step.
        """
        run = self.context.run
        if isinstance(run, StageFolder) and run.writes:
            told = {"data": dict(partial.data), "steps": self.steps, "tokens": self.tokens}
            Made(told, partial.tensors).save(run.partial)

    def saved(self) -> Made | None:
        """What :meth:`save` kept last; None: the stage begins."""
        run = self.context.run
        if not isinstance(run, StageFolder) or not run.partial.exists():
            return None
        found = Made.load(run.partial)
        self.steps, self.tokens = found["steps"], found["tokens"]
        return Made(found["data"], found.tensors)


class Work:
    """A procedure at work on one request.

    Attributes:
        system: What is to forget, as it was given: of a request that continues an earlier one, the
            system that the earlier one made, with its parts.
        request: What to forget.
        context: Of the run.
        earlier: What this procedure left for the next request (:attr:`Outcome.remembers`) when it
            made the system; None where another method made it, or nobody.
    """

    def __init__(
        self, procedure: Staged, system: System, request: ForgetRequest, context: Context
    ) -> None:
        self.procedure, self.system, self.request = procedure, system, request
        self.context, self.run = context, context.run
        found = remembered(system)
        mine = found is not None and found.data.get("procedure") == procedure.name
        self.earlier = found if mine else None
        self.start = identity_of(system)
        self.told: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = []
        self._lm: LM | None = system if isinstance(system, LM) else None

    @property
    def lm(self) -> LM:
        """The model, as the stages so far have left it.

        Raises:
            ModelError: The system gives no weights.
        """
        if self._lm is None:
            self._lm = language_model(self.system, f"procedure '{self.procedure.name}'")
        return self._lm

    def stage(
        self,
        name: str,
        make: Callable[[Stage], Made],
        *,
        inputs: Mapping[str, Any] | None = None,
        part: int | None = None,
    ) -> Made:
        """Does one stage, or reads back what it made.

        Args:
            name: One that the procedure declares (:attr:`Procedure.stages`).
            make: Does it. Whatever it changes beside what it returns is lost for a run that is
                resumed after it.
            inputs: Plain data that it depends on, beside the procedure's options, seed, request,
                model and all stages before it.
            part: Number of a part, of a stage that is done in parts (rounds, adapters).

        Raises:
            RecipeError: The procedure declares no such stage.
            RunError: The folder holds the same stage with other inputs.
        """
        at, began = self._begun(name, part, inputs or {})
        folder = at.context.run
        if not isinstance(folder, StageFolder):
            made = make(at).plain()
        elif began is None:
            made = Made.load(folder.result)
        else:
            made = make(at).plain()
            if folder.writes:
                made.save(folder.result)
        self._ended(at, began, made.digest)
        return made

    def train(
        self,
        name: str,
        recipe: Recipe,
        *,
        records: Mapping[str, Sequence[RecordBase]] | None = None,
        lm: LM | None = None,
        part: int | None = None,
        inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Trained:
        """One stage that trains by a recipe, of any composition, or reads back what it trained.

        Args:
            name: As for :meth:`stage`.
            recipe: What to do.
            records: By role; None: those of the request.
            lm: The model to train, in place; None: :attr:`lm`, which is the result from then on.
            inputs: As for :meth:`stage`.
            options: As for :class:`~delible.train.engine.Trainer`: reference, start, refusals.

        Raises:
            DelibleError: As for the trainer, and for :meth:`stage`.
        """
        refuse_shares("a procedure")
        given = records_of(self.request) if records is None else records
        model = self.lm if lm is None else lm
        told = {
            **(inputs or {}),
            "recipe": recipe.spec(),
            "records": {role: digest(rows) for role, rows in given.items()},
            "model": model.identity,
        }
        at, began = self._begun(name, part, told)
        folder = at.context.run
        if isinstance(folder, StageFolder) and began is None:
            found = trained.read(model, recipe, folder.result)
        else:
            before = trained.digests(model) if isinstance(folder, StageFolder) else {}
            made = Trainer(model, recipe, given, context=at.context, **options).train()
            if isinstance(folder, StageFolder) and folder.writes:
                trained.write(made, before, folder.result)
            found = Trained(
                made.lm, made.history, made.steps, made.tokens, made.stopped, made.notes
            )
        at.steps, at.tokens, at.history = found.steps, found.tokens, found.history
        self._ended(at, began, found.lm.identity)
        if lm is None:
            self._lm = found.lm
        return found

    def trained_by(
        self,
        name: str,
        inputs: Mapping[str, Any],
        make: Callable[[Context], trained.Result],
        precision: Precision,
        *,
        part: int | None = None,
    ) -> Trained:
        """One stage that changes :attr:`lm` in some way of its own, or reads back what it did.

        Args:
            name, part: As for :meth:`stage`.
            inputs: Plain data that it depends on.
            make: Trains, in place, in the stage's context; an adapter that the model wears has
                been merged before.
            precision: Of the model's computation afterwards.
        """
        model = self.lm
        at, began = self._begun(name, part, inputs)
        folder = at.context.run
        if model.wears_adapter:
            model.merge_adapter()
        if isinstance(folder, StageFolder) and began is None:
            found = trained.put_back(model, precision, folder.result)
        else:
            before = trained.digests(model) if isinstance(folder, StageFolder) else {}
            made = make(at.context)
            if isinstance(folder, StageFolder) and folder.writes:
                trained.write(made, before, folder.result)
            found = Trained(
                made.lm, made.history, made.steps, made.tokens, made.stopped, made.notes
            )
        at.steps, at.tokens, at.history = found.steps, found.tokens, found.history
        self._ended(at, began, found.lm.identity)
        self._lm = found.lm
        return found

    # ---- the life of a stage

    def _begun(
        self, name: str, part: int | None, inputs: Mapping[str, Any]
    ) -> tuple[Stage, float | None]:
        """The stage, and when it began; None: it has ended before."""
        declared = self.procedure.stages
        if name not in declared:
            raise RecipeError(
                f"it declares no stage '{name}'.",
                where=f"procedure '{self.procedure.name}'",
                hint=f"Declared: {', '.join(declared) or 'none'}.",
            )
        full = name if part is None else f"{name}-{part:03d}"
        if full in {one["name"] for one in self.told}:
            raise RecipeError(
                f"the stage '{full}' is done twice.",
                where=f"procedure '{self.procedure.name}'",
                hint="Give each part of a stage its number.",
            )
        self.context.stage(full, len({one["stage"] for one in self.told}), len(declared))
        if self.run is None:
            return Stage(full, self.context), time.perf_counter()
        folder = StageFolder(self.run, full)
        described = {
            "stage": full,
            "procedure": self.procedure.spec(),
            "seed": self.context.seed,
            "request": self.request.id,
            "system": self.start,
            "after": [one["result"] for one in self.told],
            "inputs": dict(inputs),
        }
        try:
            done = folder.begin(described)
        except OtherRunError as error:
            raise OtherRunError(
                f"the stage '{full}' was begun with other inputs: {error.problem}",
                where=str(folder.path),
                hint=error.hint,
            ) from None
        at = Stage(full, replace(self.context, run=folder))
        if done:
            logger.info(f"The stage '{full}' has ended before: its result is read.")
            return at, None
        return at, time.perf_counter()

    def _ended(self, at: Stage, began: float | None, result: str) -> None:
        """Notes what a stage has cost and made, in its manifest and in the run's."""
        self.history += at.history
        stage = at.name.rpartition("-")[0] if at.name not in self.procedure.stages else at.name
        folder = at.context.run if isinstance(at.context.run, StageFolder) else None
        if folder is not None and began is None:
            cost = folder.manifest["cost"]
        else:
            seconds = 0.0 if began is None else time.perf_counter() - began
            cost = {"seconds": round(seconds, 3), "steps": at.steps, "tokens": at.tokens}
        self.told.append({"name": at.name, "stage": stage, "result": result, "cost": cost})
        if folder is None or not folder.writes:
            return
        if began is not None:
            folder.finish(result=result, cost=cost)
            folder.release()
            folder.event("stage", done=True, **cost)
            _clear(folder)
        assert self.run is not None
        inputs = identity(folder.manifest["run"])
        others = [one for one in stages_of(self.run) if one["name"] != at.name]
        self.run.update(stages=[*others, {**self.told[-1], "inputs": inputs}])


def _clear(folder: StageFolder) -> None:
    """Takes away what only an interrupted stage needs."""
    import shutil

    for path in (folder.partial, folder.path / "checkpoint"):
        shutil.rmtree(path, ignore_errors=True)


__all__ = ["Stage", "Work"]
