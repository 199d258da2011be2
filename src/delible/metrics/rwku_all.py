"""RWKU's summary: recall on all forget probes together, and on all neighbour probes.

    All = mean over targets t of  sum_s n_ts r_ts / sum_s n_ts

r_ts is the mean recall of target t on split s (blanks, questions, attacks), n_ts its probes: the
mean over a target's probes, whatever their split. Paper: RWKU (arXiv 2406.10890), whose reported
values are these and not the plain mean of the three splits; reference code: jinzhuoran/RWKU (which
prints the splits only). Deviation: probes without a value are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from delible.measure.evaluate import DETAIL_SEPARATOR
from delible.measure.metric import Item, SummaryMetric, SystemValues
from delible.registry import register


def mean_over_targets(items: Sequence[Item]) -> float | None:
    """Mean over targets of the mean over their items; ``None`` where nothing has a value.

    Args:
        items: ``detail`` names the target; items without it are one target.
    """
    targets: dict[str | None, list[float]] = {}
    for item in items:
        if item.value is not None:
            name = item.detail and item.detail.split(DETAIL_SEPARATOR)[0]
            targets.setdefault(name, []).append(item.value)
    return float(np.mean([np.mean(row) for row in targets.values()])) if targets else None


@register(
    kind="metric",
    name="rwku_all",
    title="RWKU summary",
    summary="Recall over all forget probes and over all neighbour probes, averaged over targets.",
    paper="2406.10890",
    year=2024,
    family="outcome",
    capability="generate",
    changes="nothing",
    range="[0, 1]; left_out: a count",
    direction="forget: low is better; neighbour: high is better.",
    misleads="Attacks are half of the forget probes, so they decide the sum. Refusals and broken "
    "answers score 0 like what is forgotten; read the neighbours and the fluency with it.",
    badges=("parity",),
)
class RwkuAll(SummaryMetric):
    """Keys: ``rwku_all/forget``, ``rwku_all/neighbour``, ``rwku_all/SPLIT`` (averaged over
    targets), and ``rwku_all/left_out``, probes without a value.
    """

    forget: tuple[str, ...] = Field(
        ("forget_blank", "forget_question", "forget_attack"), description="Forget splits."
    )
    neighbour: tuple[str, ...] = Field(
        ("neighbour_blank", "neighbour_question"), description="Splits of the neighbours."
    )

    def uses(self) -> tuple[str, ...]:
        return ("rwku_recall",)

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """All, by side and by split."""
        by_split = values.items.get("rwku_recall", {})
        sides = {"forget": self.forget, "neighbour": self.neighbour}
        found: dict[str, float | None] = {}
        for side, splits in sides.items():
            rows = {split: by_split.get(split, ()) for split in splits}
            together = [item for row in rows.values() for item in row]
            found[f"rwku_all/{side}"] = mean_over_targets(together)
            found |= {f"rwku_all/{split}": mean_over_targets(row) for split, row in rows.items()}
        asked = [by_split.get(split, ()) for splits in sides.values() for split in splits]
        found["rwku_all/left_out"] = float(sum(item.value is None for row in asked for item in row))
        return found
