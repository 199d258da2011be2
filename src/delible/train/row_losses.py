"""One value per row from a model, differentiable: what gradients of rows are taken of.

The answer's own negative log-likelihood, or the forget loss of a host method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.train.losses import Objective
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.step import Reads, make_step
from delible.watching import unwatched

#: A value per row from the model: (model, rows) -> [rows], differentiable.
RowLoss = Callable[[LM, Sequence[Row]], Tensor]


def answer_loss(lm: LM, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
    """Token-mean negative log-likelihood of each row's answer; 0 for a row without answer."""
    reads: dict[str, Sequence[Reads]] = {"forget": ("answers",)}
    step = make_step(lm, Forward(lm), {"forget": rows}, reads, Reference())
    return -step.forget.logprob_sum / step.forget.token_count.clamp(min=1)


class ObjectiveLoss:
    """An objective's own loss per forget row, averaged over the row's units.

    Args:
        objective: The forget loss of the host method.
        rows: Rows by role, aligned by ``row.index``; those of the roles that it reads.
        reference: Values of the reference model for these rows.
    """

    def __init__(
        self, objective: Objective, rows: Mapping[str, Sequence[Row]], reference: Reference
    ) -> None:
        self.objective, self.reference = objective, reference
        self.rows = {role: {row.index: row for row in rows[role]} for role in objective.roles}

    @classmethod
    def at_start(
        cls, objective: Objective, rows: Mapping[str, Sequence[Row]], lm: LM
    ) -> ObjectiveLoss:
        """The loss whose reference model is ``lm`` as it is now."""
        reference = Reference()
        for role in objective.roles:
            reference.prepare(lm, rows[role], objective.reference_kinds(lm))
        found = objective.learn(lm, rows, reference, 0, unwatched)
        reference.learn(objective.full_name, found)
        return cls(objective, rows, reference)

    def __call__(self, lm: LM, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
        roles = self.objective.roles
        aligned: dict[str, list[Row]] = {
            role: [self.rows[role][row.index] for row in rows] for role in roles
        }
        reads: dict[str, Sequence[Reads]] = {role: self.objective.reads(lm) for role in roles}
        step = make_step(lm, Forward(lm), aligned, reads, self.reference)
        values = self.objective.loss(step)
        units = [max(1, row.units(self.objective.unit)) for row in aligned[roles[0]]]
        return values / values.new_tensor(units)
