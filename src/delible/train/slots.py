"""The ten slots of a gradient method; the two losses are in ``losses.py``. One question each.

A slot's class is a frozen config plus one method. Losses are pure functions of a step; whatever
a balancer or sampler must remember lives in the ``state`` it is handed (numbers) or in the
``memory`` (tensors), and both are checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from delible.component import Component
from delible.records import RecordBase
from delible.train.losses import Keep, Memory, Objective, Role, State
from delible.train.row import Row
from delible.watching import Stage, unwatched

if TYPE_CHECKING:
    from delible.lm.lm import LM
    from delible.system.base import System
    from delible.train.gradients import Gradients
    from delible.train.passes import Passes


@dataclass(frozen=True)
class SlotContext:
    """What a slot may look at before training starts.

    Attributes:
        lm: The model that will be trained (before any step).
        rows: Tokenized rows by role.
        records: The records behind the rows, by role.
        gradients: The service that answers questions about gradients.
        seed: Seed of the run.
        writer: The system that writes generated rows; None: the offline templates do.
        stage: Told as ``stage(title, done, total)`` by work that takes long.
    """

    lm: LM
    rows: Mapping[str, Sequence[Row]]
    records: Mapping[str, Sequence[RecordBase]]
    gradients: Gradients
    objective: Objective
    keep: Keep | None
    seed: int
    writer: System | None = None
    stage: Stage = unwatched

    def generator(self, purpose: str) -> torch.Generator:
        """A random generator of this run for one purpose."""
        from delible.train.randomness import generator

        return generator(self.seed, purpose)


class Generate(Component):
    """Which rows are made before training.

    Attributes:
        makes: Roles of rows that it always makes.
    """

    makes: ClassVar[tuple[Role, ...]] = ()

    def prepare(self, lm: LM) -> None:
        """What the model must have before rows are made or read, such as new tokens.

        Called at every start of a run, also where its rows are there already; a second call
        changes nothing.
        """

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        """The records that were made, by role; ``context.rows`` is still empty.

        Roles other than ``retain`` are aligned with the forget records. Where a forget record
        needs several partners, or is dropped, ``forget`` is returned too and takes the place of
        the given records.

        Raises:
            DataError: Too few rows could be made.
        """
        raise NotImplementedError

    def instruction(self, context: SlotContext) -> str | None:
        """What the reference model is told before each question, for losses that are
        ``instructed``; None: nothing.
        """
        return None


class Select(Component):
    """Which forget rows are used."""

    def choose(self, context: SlotContext) -> list[int]:
        """Indices of the forget rows to train on, ascending, at least one."""
        raise NotImplementedError


class Sample(Component):
    """In which order forget and retain rows meet."""

    def epoch(
        self,
        forget: Sequence[Row],
        retain: Sequence[Row],
        epoch: int,
        generator: torch.Generator,
    ) -> list[tuple[int, int | None]]:
        """Pairs of (forget index, retain index) in the order they are used in one epoch.

        Args:
            forget, retain: Rows; ``row.kind`` and ``row.neighbour_of`` tell retain rows apart.
            epoch: Counted from 0.
            generator: Random numbers of this epoch.

        Retain indices are None when there are no retain rows.
        """
        raise NotImplementedError


class Weigh(Component):
    """How much a forget row counts."""

    def weights(self, context: SlotContext) -> Float[Tensor, " rows"]:
        """One weight per forget row, with mean 1."""
        raise NotImplementedError

    def due(self, epoch: int) -> bool:
        """Whether the rows are weighed anew, at the model as it is then, before ``epoch``
        (from 1; the first epoch is 0).
        """
        return False


@dataclass
class Placement:
    """Which parameters move.

    Attributes:
        parameters: Trainable parameters by name.
        masks: Boolean masks by parameter name: only True entries move. None: all of them.
        masked_decay: Whether weight decay respects the masks (it must, or frozen weights drift;
            False only to reproduce released code).
        each_step: Is handed each step's passes before their gradient is taken and returns the
            masks of this one step, for every parameter; entries outside them stay where they are,
            whatever the optimiser remembers. What it leaves in ``.grad`` is added to.
    """

    parameters: dict[str, torch.nn.Parameter]
    masks: dict[str, Tensor] | None = None
    masked_decay: bool = True
    each_step: Callable[[Passes], dict[str, Tensor] | None] | None = None


class Place(Component):
    """Which parameters move.

    Attributes:
        continues: It trains on what the model wears: an adapter is not merged first.
    """

    continues: ClassVar[bool] = False

    def moving_blocks(self, lm: LM) -> Sequence[int] | None:
        """Blocks that alone may move, where the options say so; None: it shows in :meth:`apply`."""
        return None

    def apply(self, context: SlotContext) -> Placement:
        """Freezes and unfreezes parameters (or adds an adapter) and says what moves."""
        raise NotImplementedError


class Balance(Component):
    """How the forget and the retain loss become one update."""

    def start(self) -> State:
        """What is remembered, at the beginning."""
        return {}

    def prepare(self, context: SlotContext, placement: Placement) -> Memory:
        """Before the first step, at the start model: tensors that the run remembers."""
        return {}

    def updating(
        self, parameters: Sequence[torch.nn.Parameter], memory: Memory
    ) -> AbstractContextManager[None]:
        """Context of the optimiser's update, which may bound the change of the weights."""
        return nullcontext()

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        """Weights of the forget and of the retain loss at this step.

        Args:
            progress: Share of the run's planned steps that are done, in [0, 1).
        """
        raise NotImplementedError

    def gradient(self, passes: Passes, harden: Harden) -> None:
        """Leaves the gradient of this step in the parameters' ``.grad``."""
        if harden.single_pass:
            passes.both()
        else:
            harden.forget(passes)
            passes.keep()

    def observe(self, forget: float, keep: float | None, epoch: float, state: State) -> None:
        """After a step: both losses of the whole step, to update what is remembered."""


class Harden(Component):
    """Against what the result must hold."""

    #: Whether forget and retain gradients may come from one pass at the same point.
    single_pass: ClassVar[bool] = False

    def repeats(self) -> int:
        """How many optimiser steps in a row are made on the same rows."""
        return 1

    def forget(self, passes: Passes) -> None:
        """Adds the hardened gradient of the forget loss to ``.grad``."""
        raise NotImplementedError


@dataclass(frozen=True)
class FinishContext:
    """What a finisher may use.

    Attributes:
        lm: The trained model.
        start: Loads the model as it was before training.
        records: Records by role.
        folder: Where the finisher may leave a record of what it did.
        parameters: What was trained, by name.
        memory: What :meth:`Finish.observe` wrote down.
        stage: Told as ``stage(title, done, total)`` by work that takes long.
    """

    lm: LM
    start: Callable[[], LM]
    records: Mapping[str, Sequence[RecordBase]]
    folder: Path | None
    notes: dict[str, object] = field(default_factory=dict)
    parameters: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    stage: Stage = unwatched


class Finish(Component):
    """What happens after the last step."""

    #: Whether it calls ``context.start``.
    needs_start: ClassVar[bool] = False

    def check(self, total: int) -> None:
        """Before the first of ``total`` steps: refuses a run that it cannot finish.

        Raises:
            RecipeError: Says what to change.
        """

    def observe(
        self, step: int, total: int, parameters: Sequence[torch.nn.Parameter], memory: Memory
    ) -> None:
        """After step ``step`` (from 1) of ``total``: what should be remembered of the weights."""

    def apply(self, context: FinishContext) -> LM:
        """The finished model (the trained one changed in place, or another)."""
        raise NotImplementedError
