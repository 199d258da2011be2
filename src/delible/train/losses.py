"""What a loss is: a pure function of a step, summed per row, that declares what it reads.

The objective forgets, the keep loss keeps; both are slots of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from delible.component import Component
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads, Step
from delible.watching import Stage, unwatched

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Roles of rows in a step. All but ``retain`` are aligned with the forget rows: ``refusal`` (the
#: same question, declined), ``alternate`` (another, false answer), ``target`` (what should be said
#: instead), ``prefilled`` (an answer that begins as the model is lured to begin), ``known`` (the
#: same sentence about somebody whom the model keeps).
Role = Literal["forget", "retain", "refusal", "alternate", "target", "prefilled", "known"]
#: Numbers a component keeps between steps; saved in checkpoints.
State = dict[str, float]
#: Tensors that components keep between steps, saved in checkpoints: under "component.what", one
#: tensor per moving parameter, in their order (or whatever the component wants to list).
Memory = dict[str, list[Tensor]]


class Loss(Component):
    """A loss over the rows of one role, summed per row.

    Attributes:
        unit: What the engine averages over.
        roles: Roles of rows that the loss reads; the first one carries the row weights.
        reference: Kinds of reference values it needs, such as ``("logprobs",)``.
        instructed: Whether the reference model reads the generator's instruction before each
            question, so that it is a teacher; the trained model never sees the instruction.
    """

    unit: ClassVar[Unit] = "row"
    roles: ClassVar[tuple[Role, ...]] = ("forget",)
    reference: ClassVar[tuple[str, ...]] = ()
    instructed: ClassVar[bool] = False

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        """What it reads of the model: ``"answers"`` or block indices."""
        return ("answers",)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        """Kinds of reference values with layers filled in."""
        return self.reference

    def learn(
        self, lm: LM, rows: Mapping[str, Sequence[Row]], stage: Stage = unwatched
    ) -> Mapping[str, Tensor]:
        """What it needs to know of the reference model as a whole, as tensors; default: nothing.

        Made once, before the first step, and kept with the reference values: a loss finds it as
        ``group.reference.learned(NAME)``.

        Args:
            lm: The reference model.
            rows: All rows of the run, by role.
            stage: Told by work that takes long.
        """
        return {}


class Objective(Loss):
    """The forget loss."""

    def concerns(self, row: Row) -> bool:
        """Whether the loss says anything about a row of its first role."""
        return True

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        """Sum over each forget row's units, to be minimised."""
        raise NotImplementedError


class Keep(Loss):
    """The retain loss."""

    roles: ClassVar[tuple[Role, ...]] = ("retain",)

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        """Sum over each retain row's units, to be minimised."""
        raise NotImplementedError
