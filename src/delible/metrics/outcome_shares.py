"""Outcome shares: how the answers of a split divide into correct, refusal, wrong and garbage.

Counts the classes of the metric ``outcome``; a record asked with n prompt variants gives each of
its classes 1/n.
"""

from __future__ import annotations

from collections.abc import Sequence

from delible.measure.metric import Item, SummaryMetric, SystemValues
from delible.registry import register

CLASSES = ("correct", "refusal", "wrong-but-fluent", "garbage")


def outcome_shares(items: Sequence[Item]) -> dict[str, float]:
    """Share of each class among the items that have one.

    Args:
        items: Items of ``outcome``; several variants' classes are joined with ``" | "``.

    Returns:
        Four shares that sum to 1; empty without a classified item.
    """
    counts = dict.fromkeys(CLASSES, 0.0)
    counted = 0
    for item in items:
        if item.detail is None or item.value is None:
            continue
        found = item.detail.split(" | ")
        for name in found:
            counts[name] += 1 / len(found)
        counted += 1
    return {name: count / counted for name, count in counts.items()} if counted else {}


@register(
    kind="metric",
    name="outcome_shares",
    title="Outcome shares",
    summary="Share of correct, refused, wrong-but-fluent and garbage answers in every split.",
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1] each; they sum to 1 in a split",
    direction="correct: the fact is said. refusal: it is held back. garbage: the model is broken.",
    misleads="As 'outcome': decided by rules. Many refusals on the forget split say nothing about "
    "whether the knowledge is gone.",
    badges=("experimental",),
)
class OutcomeShares(SummaryMetric):
    """Keys are ``outcome_shares/SPLIT/CLASS``."""

    def uses(self) -> tuple[str, ...]:
        return ("outcome",)

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        return {
            f"outcome_shares/{split}/{name}": share
            for split, items in values.items.get("outcome", {}).items()
            for name, share in outcome_shares(items).items()
        }
