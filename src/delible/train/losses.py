"""What a loss is: a pure function of a step, summed per row, that declares what it reads.

The objective forgets, the keep loss keeps; both are slots of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from delible.component import Component
from delible.records import RecordBase
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Roles of rows in a step. All but ``retain`` are aligned with the forget rows: ``refusal`` (the
#: same question, declined), ``alternate`` (another, false answer), ``target`` (what should be said
#: instead), ``prefilled`` (an answer that begins as the model is lured to begin).
Role = Literal["forget", "retain", "refusal", "alternate", "target", "prefilled"]
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


class Objective(Loss):
    """The forget loss."""

    def contexts(self, record: RecordBase) -> Mapping[str, str]:
        """Texts before a record of the first role, by name, with each of which the reference model
        reads it, too (for reference values ``"answers@NAME"``).
        """
        return {}

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
