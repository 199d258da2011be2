"""Membership inference: do the forgotten texts still look as if the model had seen them?

    score of a record = - (loss, zlib, Min-K, Min-K++, gradient norm, or loss above a reference)
    AUC               = P(a forgotten text scores higher than one that no system saw), ties half
    PrivLeak          = 100 (A - A_R) / A_R,   A = 1 - AUC, A_R that of the reference

The scores are those of the metrics of the same names, their sign turned, so that larger means
more like a text that was seen. An AUC *below* the reference's says as much as one above it: texts
that look less seen than unseen ones were marked by unlearning.

Papers: arXiv 2407.06460 (PrivLeak), arXiv 2506.12618 (the six attacks). Reference code:
github.com/locuslab/open-unlearning. Deviations: the sign, and that a record without a value is
left out and counted; PrivLeak is told for each attack, not for Min-K alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from delible.cards import Depth
from delible.component import build
from delible.errors import DataError, ModelError
from delible.measure.attack import AttackContext, Budget, Findings, InferenceAttack, Seen
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, SystemValues
from delible.measure.scoring.separation import area_under_curve, privacy_leak
from delible.records import RecordBase
from delible.registry import register
from delible.system.base import System

WHERE = "attack 'membership'"
Score = Literal["loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference"]
#: The metric behind each score, and its title.
METRICS: dict[str, tuple[str, str]] = {
    "loss": ("loss_attack", "loss"),
    "zlib": ("zlib_attack", "loss per compressed byte"),
    "min_k": ("min_k", "Min-K"),
    "min_k_plus_plus": ("min_k_plus_plus", "Min-K++"),
    "gradient_norm": ("gradient_norm", "gradient norm"),
    "reference": ("loss_attack", "loss above the reference's"),
}
#: Unseen texts that may be taken for seen ones where the true-positive rate is told.
FALSE_POSITIVES = 0.05


def detected(
    unseen: Sequence[float], seen: Sequence[float], share: float = FALSE_POSITIVES
) -> float | None:
    """Share of the seen texts that score above all but a share of the unseen ones.

    Args:
        unseen: Scores of texts that nobody saw, shape [n].
        seen: Scores of the forgotten texts, shape [m].
        share: Of the unseen texts that may score above the threshold.

    Returns:
        A value in [0, 1]: higher = more are told. ``None`` if a group is empty.
    """
    if not unseen or not seen:
        return None
    order = np.sort(np.asarray(unseen, np.float64))[::-1]
    threshold = order[int(share * len(order))]
    return float((np.asarray(seen, np.float64) > threshold).mean())


@register(
    kind="attack",
    name="membership",
    title="Membership inference",
    summary="Tells from the loss of the forgotten texts whether the model was trained on them.",
    paper="2407.06460",
    year=2024,
    family="inference",
    needs=("forget",),
    changes="nothing",
    reversible=True,
    capability="score",
    depth="standard",
    misleads="Unseen texts of another kind, time or length are told apart by any model. An AUC of "
    "0.5 of these scores is no proof: stronger attacks exist. A refusing model has a high loss.",
    badges=("variant",),
    variant="Larger means more like a seen text; PrivLeak for every score.",
)
class MembershipInference(InferenceAttack):
    """Options of membership inference."""

    compares = ("reference",)

    score: Score = Field("min_k", description="What the texts are told by.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Min-K, loss, zlib and Min-K++; deep also the gradient's norm and the reference's loss."""
        cheap = ("min_k", "loss", "zlib", "min_k_plus_plus")
        return [
            {"score": one}
            for one in (*cheap, *(("reference", "gradient_norm") if depth == "deep" else ()))
        ]

    def variant_title(self) -> str:
        """Such as "Min-K"."""
        return METRICS[self.score][1]

    def budget(self, context: AttackContext) -> Budget:
        """One score of each text."""
        return Budget(queries=len(context.forget) + len(context.holdout))

    def infer(self, system: System, context: AttackContext) -> Seen:
        """Scores of the forgotten texts and of unseen ones, and how well they are told apart.

        Raises:
            DataError: No forgotten text has a score.
            ModelError: The system gives not what the score needs, or there is no reference.
        """
        splits = {"forget": context.forget, "holdout": context.holdout}
        found = self._scores(system, splits)
        if self.score == "reference":
            if context.reference is None:
                raise ModelError(
                    "there is no reference to compare the loss with.",
                    where=WHERE,
                    hint="Add --reference MODEL, or choose another score.",
                )
            least = self._scores(context.reference, splits)
            found = {
                split: [_above(*pair) for pair in zip(row, least[split], strict=True)]
                for split, row in found.items()
            }
        seen, unseen = (
            [item.value for item in found[split] if item.value is not None] for split in splits
        )
        if not seen:
            reason = found["forget"][0].reason if found["forget"] else "there are no records"
            raise DataError(f"no forgotten text has a score: {reason}.", where=WHERE)
        left_out = sum(map(len, found.values())) - len(seen) - len(unseen)
        numbers: dict[str, float | None] = {}
        if unseen:
            numbers = {
                "auc": area_under_curve(unseen, seen),
                "told_at_5_percent": detected(unseen, seen),
            }
        else:
            context.notes["note"] = (
                "There are no texts that no system saw, so there is no AUC: add --holdout FILE."
            )
        if left_out:
            numbers["left_out"] = float(left_out)
        return Seen(found, numbers)

    def _scores(
        self, system: System, splits: Mapping[str, Sequence[RecordBase]]
    ) -> dict[str, list[Item]]:
        """The metric's values with the sign turned: larger means more like a seen text."""
        name = METRICS[self.score][0]
        values = evaluate(system, splits, [build("metric", name)])
        if name in values.skipped:
            raise ModelError(f"the score cannot be taken: {values.skipped[name]}.", where=WHERE)
        return {
            split: [
                Item(None if item.value is None else -item.value, item.reason)
                for item in values.items[name][split]
            ]
            for split in splits
        }

    def findings(
        self, values: Mapping[str, SystemValues], splits: Mapping[str, Sequence[RecordBase]]
    ) -> Findings:
        """PrivLeak of every system, in percent: 0 = like the reference, -100 = all are told."""
        areas = {
            system: _area(one) for system, one in values.items()
        }  # fmt: skip
        reference = areas.get("reference")
        if reference is None:
            return {}
        return {
            "privacy_leak": {
                system: privacy_leak(area, reference)
                for system, area in areas.items() if area is not None
            }
        }  # fmt: skip


def _above(ours: Item, theirs: Item) -> Item:
    if ours.value is None or theirs.value is None:
        return Item(None, ours.reason or theirs.reason)
    return Item(ours.value - theirs.value)


def _area(values: SystemValues) -> float | None:
    for by_split in values.items.values():  # one measure only
        seen, unseen = (
            [item.value for item in by_split.get(split, ()) if item.value is not None]
            for split in ("forget", "holdout")
        )
        return area_under_curve(unseen, seen)
    return None
