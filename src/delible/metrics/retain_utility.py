"""Retain utility: is as much kept as by retraining, neither less nor more?

    R.U. = max(0, 1 - |R / RQ - 1|),    R = 100 (Prob x ROUGE x Acc)^(1/3) on all that remains

RQ is what R should be after the share ``progress`` of a stream of requests: on the line from the
model before the first request to the reference after the last one. Paper: FIT (arXiv 2601.21682);
reference code: XiaoyuXU1/FIT. Deviations: that code mixes up the accuracies of the forget and the
retain set (``compat`` does so too) and compares the prompt along with the answer; Acc is of the
answer's tokens after the question, there of a running text about the same.
"""

from __future__ import annotations

from pydantic import Field

from delible.measure.metric import SummaryMetric, SystemValues
from delible.measure.scoring.closeness import PARTS, judged
from delible.registry import register


@register(
    kind="metric",
    name="retain_utility",
    title="Retain utility",
    summary="How close what is left of the other records is to that of a retrained model.",
    paper="2601.21682",
    year=2026,
    family="utility",
    capability="score",
    changes="nothing",
    range="retain_utility: [0, 1]; retain_score: [0, 100]",
    direction="1: as much is kept as by retraining; lower: less is kept, or more (see "
    "retain_score).",
    misleads="A model that answers better than the reference is punished like one that is worse. "
    "Only the retained records' own questions are asked, not general ability.",
    badges=("parity",),
)
class RetainUtility(SummaryMetric):
    """Keys: ``retain_utility``, ``retain_score`` and ``retain_score_target``."""

    split: str = Field("retain", description="All records that are not deleted (yet).")
    progress: float = Field(1.0, gt=0, le=1, description="Requests done, as a share of all.")
    start_score: float | None = Field(
        None, ge=0, le=100, description="Score before the first request, needed if not all is done."
    )
    compat: bool = Field(False, description="Take the accuracy of the forget split.")

    def uses(self) -> tuple[str, ...]:
        return PARTS

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """Closeness, score and target; ``None`` for what needs a reference that is not there.

        Raises:
            RecipeError: ``progress`` is below 1 and there is no ``start_score``.
        """
        accuracy_split = "forget" if self.compat else None
        near, score, target = judged(
            values, reference, self.split, accuracy_split, self.progress, self.start_score
        )
        return {"retain_utility": near, "retain_score": score, "retain_score_target": target}
