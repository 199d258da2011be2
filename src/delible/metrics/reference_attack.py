"""Reference attack: the loss of a text, set against the loss of a model that never saw it.

    score = loss(system) - loss(reference),    AUC over members and non-members

What makes a text hard in itself cancels out. As for all membership attacks here, a larger score
means: less likely a member. Paper: Carlini et al. 2021 (arXiv 2012.07805); reference code:
locuslab/open-unlearning (default reference: the retrained model). Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from delible.errors import DataError
from delible.measure.metric import SummaryMetric, SystemValues
from delible.measure.scoring.separation import area_under_curve
from delible.registry import register


def calibrated(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Differences of the losses of the same texts, where both have one."""
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


@register(
    kind="metric",
    name="reference_attack",
    title="Reference attack",
    summary="How well the loss above that of a model that never saw them tells forgotten texts.",
    paper="2012.07805",
    year=2021,
    family="membership",
    capability="score",
    changes="nothing",
    range="auc: [0, 1]; means: (-inf, inf) nats per token",
    direction="auc near 1: the forgotten texts are recognised as seen; 0.5: they are like unseen "
    "ones; near 0: unlearning marked them.",
    misleads="Needs a reference of the same architecture and training: any other difference "
    "between the models is read as membership. The reference against itself gives 0.5.",
    badges=("parity",),
)
class ReferenceAttack(SummaryMetric):
    """Keys: ``reference_attack/auc`` and the mean differences ``reference_attack/SPLIT``."""

    members: str = Field("forget", description="The split that was trained on.")
    others: str = Field("holdout", description="A split of the same kind that was not.")

    def uses(self) -> tuple[str, ...]:
        return ("loss_attack",)

    def _differences(
        self, values: SystemValues, reference: SystemValues, split: str
    ) -> list[float]:
        ours, theirs = (
            [item.value for item in one.items.get("loss_attack", {}).get(split, ())]
            for one in (values, reference)
        )
        if len(ours) != len(theirs):
            raise DataError(
                f"{len(ours)} records of '{values.system}' against {len(theirs)} of "
                f"'{reference.system}'.",
                where=f"split '{split}'",
                hint="Measure both systems on the same records.",
            )
        return calibrated(ours, theirs)

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """The area and the two means; ``None`` without a reference or without records.

        Raises:
            DataError: The two systems were asked different numbers of records.
        """
        differences: dict[str, list[float]] = {self.members: [], self.others: []}
        if reference is not None:
            differences = {
                split: self._differences(values, reference, split) for split in differences
            }
        return {
            "reference_attack/auc": area_under_curve(
                differences[self.members], differences[self.others]
            ),
            **{
                f"reference_attack/{split}": float(np.mean(row)) if row else None
                for split, row in differences.items()
            },
        }
