"""Forget degree: is as much forgotten as by retraining, neither less nor more?

    F.D. = max(0, 1 - |F / FQ - 1|),    F = 100 (Prob x ROUGE x Acc)^(1/3) on what is deleted so far

FQ is what F should be after the share ``progress`` of a stream of requests: on the line from the
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
    name="forget_degree",
    title="Forget degree",
    summary="How close what is left of the deleted records is to that of a retrained model.",
    paper="2601.21682",
    year=2026,
    family="indistinguishability",
    capability="score",
    changes="nothing",
    range="forget_degree: [0, 1]; forget_score: [0, 100]",
    direction="1: as much is left as after retraining; lower: too little or too much is forgotten "
    "(see forget_score).",
    misleads="Says nothing about attacks. The score of a reference near 0 makes every system look "
    "bad; without the start, only the end of a stream of requests can be judged.",
    badges=("parity",),
)
class ForgetDegree(SummaryMetric):
    """Keys: ``forget_degree``, ``forget_score`` and ``forget_score_target``."""

    split: str = Field("forget", description="The records deleted so far.")
    progress: float = Field(1.0, gt=0, le=1, description="Requests done, as a share of all.")
    start_score: float | None = Field(
        None, ge=0, le=100, description="Score before the first request, needed if not all is done."
    )
    compat: bool = Field(False, description="Take the accuracy of the retain split.")

    def uses(self) -> tuple[str, ...]:
        return PARTS

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """Closeness, score and target; ``None`` for what needs a reference that is not there.

        Raises:
            RecipeError: ``progress`` is below 1 and there is no ``start_score``.
        """
        accuracy_split = "retain" if self.compat else None
        near, score, target = judged(
            values, reference, self.split, accuracy_split, self.progress, self.start_score
        )
        return {"forget_degree": near, "forget_score": score, "forget_score_target": target}
