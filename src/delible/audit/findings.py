"""What can be said from an audit's measurements: the matrix, the summaries, the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from delible import registry
from delible.audit.result import (
    AuditResult,
    Curve,
    Example,
    Leak,
    Measurement,
    SystemInfo,
    SystemRole,
)
from delible.audit.verdict import erased, verdict, worst_by_attack
from delible.files import atomic_file
from delible.measure.evaluate import DETAIL_SEPARATOR, bootstrap_interval
from delible.measure.metric import ItemMetric, SummaryMetric, SystemValues
from delible.records import RecordBase
from delible.system.questions import answer_of, ask

#: Knowledge scores of the attack x leak matrix, larger = more is known; the first one that a
#: system allows decides the verdict.
LEAK_MEASURES = ("answer_probability", "extraction_strength", "rouge_l_recall", "outcome")
#: Forget answers this much less likely than in the reference count as over-forgotten.
OVER_FORGOTTEN = 0.25

_NEVER_TESTED = (
    "Longer relearning, other optimisers and other learning rates than the listed ones.",
    "Attacks with another model as attacker.",
    "Traces inside the model: patching, probing and direction ablation.",
    "Other languages and conversations of several turns.",
)


@dataclass
class Setting:
    """Values of one attack setting, by system."""

    attack: str
    variant: str
    title: str
    values: dict[SystemRole, SystemValues] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    curves: dict[SystemRole, list[tuple[int, float | None]]] = field(default_factory=dict)


@dataclass
class Findings:
    """The measurements of one audit.

    Attributes:
        settings: The plain question first, then every attack setting.
        answers: Shown answers by system and (split, record): text and outcome class.
        notes: What was left out while asking.
    """

    splits: Mapping[str, Sequence[RecordBase]]
    metrics: Sequence[ItemMetric | SummaryMetric]
    seed: int
    guarded: bool
    settings: list[Setting]
    notes: list[str]
    infos: dict[SystemRole, SystemInfo] = field(default_factory=dict)
    answers: dict[SystemRole, dict[tuple[str, int], tuple[str, str]]] = field(default_factory=dict)

    def result(self, seconds: float, measured: dict[str, int]) -> AuditResult:
        """Everything that can be said."""
        found, plain = self.settings, self.settings[0]
        summaries = self._summaries(plain)
        leaks = [self._leak(place, plain) for place in found]
        measure = next(
            (name for name in LEAK_MEASURES if leaks[0].erased.get(name) is not None),
            LEAK_MEASURES[0],
        )
        return AuditResult(
            systems=self.infos,
            splits={name: len(records) for name, records in self.splits.items()},
            measurements=[
                measurement
                for place in found
                for role, values in place.values.items()
                for measurement in self._measurements(role, place, values)
            ],
            summaries=summaries,
            outcomes=self._outcomes(plain),
            leaks=leaks,
            verdict=verdict(
                leaks[0].erased.get(measure),
                self._utility_kept(summaries, plain),
                worst_by_attack(leaks, measure),
                without_reference="reference" not in self.infos,
                over_forgotten=self._over_forgotten(plain),
                white_box="weights" in self.infos["unlearned"].capabilities,
                removable_guard=self.guarded,
            ),
            curves=self._curves(),
            examples=self._examples(),
            not_tested=[*self.notes, *self._untested()],
            seconds=round(seconds, 1),
            measured=measured,
        )

    def _summaries(self, plain: Setting) -> dict[SystemRole, dict[str, float | None]]:
        reference = plain.values.get("reference")
        summaries: dict[SystemRole, dict[str, float | None]] = {}
        for role, values in plain.values.items():
            summaries[role] = {}
            for metric in self.metrics:
                if isinstance(metric, SummaryMetric) and all(
                    name in values.items for name in metric.uses()
                ):
                    summaries[role].update(metric.summarise(values, reference))
        return summaries

    def _leak(self, place: Setting, plain: Setting) -> Leak:
        knowledge: dict[str, dict[SystemRole, float | None]] = {}
        retain: dict[str, dict[SystemRole, float | None]] = {}
        scores: dict[str, float | None] = {}
        for measure in LEAK_MEASURES:
            mine = {
                role: values.means[measure].get("forget")
                for role, values in place.values.items()
                if measure in values.means
            }
            if not mine:
                continue
            knowledge[measure] = mine
            retain[measure] = {
                role: values.means[measure].get("retain")
                for role, values in place.values.items()
                if measure in values.means
            }
            original = self._mean(plain, "original", measure, "forget")
            floor = mine.get("reference")
            if floor is None and "reference" not in self.infos:
                floor = self._unknown_topic(plain, measure)
            scores[measure] = erased(mine.get("unlearned"), original, floor)
        notes = [str(place.notes[key]) for key in ("skipped", "note") if key in place.notes]
        if "collision_rate" in place.notes:
            notes.append(
                f"{float(place.notes['collision_rate']):.0%} of the quantized weights have the "
                "same code as in the original."
            )
        return Leak(
            attack=place.attack,
            variant=place.variant,
            title=place.title,
            knowledge=knowledge,
            erased=scores,
            retain=retain,
            cost_seconds=round(place.seconds, 1),
            note=" ".join(notes) or None,
        )

    def _unknown_topic(self, plain: Setting, measure: str) -> float | None:
        """Without a reference: what the original scores on records it never saw."""
        held = self._mean(plain, "original", measure, "holdout")
        return held if held is not None else None

    @staticmethod
    def _mean(place: Setting, role: SystemRole, measure: str, split: str) -> float | None:
        values = place.values.get(role)
        return values.means.get(measure, {}).get(split) if values is not None else None

    def _utility_kept(
        self, summaries: Mapping[SystemRole, Mapping[str, float | None]], plain: Setting
    ) -> float | None:
        now, then = (
            summaries.get(role, {}).get("model_utility") for role in ("unlearned", "original")
        )
        if now is not None and then:
            return min(1.0, now / then)
        ratios = []
        for split in ("retain", "neighbours", "general"):
            for measure in LEAK_MEASURES:
                kept = self._mean(plain, "unlearned", measure, split)
                had = self._mean(plain, "original", measure, split)
                if kept is not None and had:
                    ratios.append(min(1.0, kept / had))
                    break
        return float(np.mean(ratios)) if ratios else None

    def _over_forgotten(self, plain: Setting) -> bool:
        mine = self._mean(plain, "unlearned", "answer_probability", "forget")
        never = self._mean(plain, "reference", "answer_probability", "forget")
        return mine is not None and never is not None and mine < OVER_FORGOTTEN * never

    def _measurements(
        self, role: SystemRole, place: Setting, values: SystemValues
    ) -> list[Measurement]:
        rows = []
        for metric, by_split in values.items.items():
            for split, items in by_split.items():
                numbers = [item.value for item in items if item.value is not None]
                low, high = bootstrap_interval(numbers, self.seed)
                reasons = [item.reason for item in items if item.value is None]
                rows.append(
                    Measurement(
                        system=role,
                        attack=place.attack,
                        variant=place.variant,
                        split=split,
                        metric=metric,
                        value=values.means[metric][split],
                        low=low,
                        high=high,
                        n=len(numbers),
                        skipped=len(reasons),
                        reason=reasons[0] if reasons else None,
                    )
                )
        return rows

    @staticmethod
    def _outcomes(plain: Setting) -> dict[SystemRole, dict[str, dict[str, float]]]:
        shares: dict[SystemRole, dict[str, dict[str, float]]] = {}
        for role, values in plain.values.items():
            for split, items in values.items.get("outcome", {}).items():
                classes = [
                    name
                    for item in items
                    if item.detail
                    for name in item.detail.split(DETAIL_SEPARATOR)
                ]
                if classes:
                    shares.setdefault(role, {})[split] = {
                        name: classes.count(name) / len(classes) for name in sorted(set(classes))
                    }
        return shares

    def _curves(self) -> list[Curve]:
        curves = []
        for place in self.settings:
            steps = sorted({step for points in place.curves.values() for step, _ in points})
            if len(steps) < 2:
                continue
            curves.append(
                Curve(
                    attack=place.attack,
                    variant=place.variant,
                    metric="answer_probability",
                    steps=steps,
                    values={
                        role: [dict(points).get(step) for step in steps]
                        for role, points in place.curves.items()
                        if points
                    },
                )
            )
        return curves

    def _examples(self) -> list[Example]:
        examples = []
        for split, index in self.answers["unlearned"]:
            record = self.splits[split][index]
            prompt = ask(record)
            if prompt is None or not prompt.messages:
                continue
            examples.append(
                Example(
                    split=split,
                    question=prompt.messages[-1].content,
                    expected=answer_of(record),
                    answers={role: found[split, index][0] for role, found in self.answers.items()},
                    outcomes={role: found[split, index][1] for role, found in self.answers.items()},
                )
            )
        return examples

    def _untested(self) -> list[str]:
        found = self.settings
        run = {place.attack for place in found}
        lines = [
            f"{card.title} ({card.name}): not run."
            for card in registry.cards("attack")
            if card.name not in run
        ]
        lines += [
            f"{place.title} ({place.variant or place.attack}): {place.notes['skipped']}."
            for place in found
            if "skipped" in place.notes
        ]
        skipped = found[0].values["unlearned"].skipped
        lines += [f"Metric {name}: {reason}." for name, reason in skipped.items()]
        return lines + list(_NEVER_TESTED)


def write_items(path: Path, settings: Sequence[Setting]) -> None:
    """One row per system, attack, metric, split and record."""
    import pyarrow as arrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "system", "attack", "variant", "metric", "split", "record", "value", "reason", "detail",
        )
    }  # fmt: skip
    for place in settings:
        for role, values in place.values.items():
            for metric, by_split in values.items.items():
                for split, items in by_split.items():
                    for record, item in enumerate(items):
                        row = (
                            role, place.attack, place.variant, metric, split, record, item.value,
                            item.reason, item.detail,
                        )  # fmt: skip
                        for column, value in zip(columns.values(), row, strict=True):
                            column.append(value)
    table = arrow.table(
        {
            name: arrow.array(
                column,
                arrow.float64()
                if name == "value"
                else arrow.int64()
                if name == "record"
                else arrow.string(),
            )
            for name, column in columns.items()
        }
    )
    with atomic_file(path, "wb") as handle:
        parquet.write_table(table, handle)
