"""What a loss is: a pure function of a step, summed per row, that declares what it reads.

The objective forgets, the keep loss keeps; both are slots of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from jaxtyping import Float
from torch import Tensor

from delible.component import Component
from delible.records import RecordBase
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads, Step
from delible.watching import Stage

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

    def settled(self, moving: Sequence[int]) -> Self:
        """The loss once it is known in which blocks weights move (ascending)."""
        return self

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> Mapping[str, Tensor]:
        """What it must know beside values of rows, by name: made once, before the first step.

        A loss reads it as ``group.reference.learned(self.full_name, name)``; it is kept with the
        reference's values, so that a resumed run reads the same bits.

        Args:
            lm: The reference model: the start model, unless another one is given.
            rows: All rows of the run by role; of retain rows a keep loss gets those of its steps.
            reference: Values of the rows that it reads, prepared.
            stage: Told by work that takes long.
        """
        return {}

    @property
    def full_name(self) -> str:
        """Slot and name."""
        return f"{self.card.kind} '{self.card.name}'"


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

    def reads_beside(self, lm: LM) -> tuple[Reads, ...]:
        """What it reads of the forget rows; by default nothing, and it says nothing of them."""
        return ()

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        """Sum over each retain row's units, to be minimised."""
        raise NotImplementedError

    def beside(self, forget: Group) -> Float[Tensor, " rows"]:
        """What must hold of forget rows: the sum over each one's answer tokens, to be minimised.

        The engine adds its mean over the answer tokens of the step's forget rows to the mean of
        :meth:`loss`. Asked for only where :meth:`reads_beside` names something.
        """
        raise NotImplementedError
