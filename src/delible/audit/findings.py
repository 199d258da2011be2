"""What can be said from an audit's measurements: the matrix, the summaries, the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from delible import registry
from delible.audit.card import full_stack
from delible.audit.cheapest import cheapest_sentence
from delible.audit.erasure import over_forgotten
from delible.audit.leaks import INSIDE, WITHOUT_PART, Setting, compared, leak, places
from delible.audit.result import (
    AuditResult,
    Curve,
    Example,
    Measurement,
    SystemInfo,
    SystemRole,
)
from delible.audit.utility import Answers, utility
from delible.audit.verdict import verdict
from delible.cards import Depth
from delible.files import atomic_file
from delible.measure.evaluate import DETAIL_SEPARATOR, bootstrap_interval
from delible.measure.metric import ItemMetric, SummaryMetric, SystemValues
from delible.records import RecordBase
from delible.system.questions import answer_of, ask

#: What no audit tests whatever it runs.
_NEVER_TESTED = (
    "Longer relearning, other optimisers and other learning rates than the listed ones.",
    "What a determined person finds who tries for longer, or knows more, than these attacks.",
)


@dataclass
class Findings:
    """The measurements of one audit.

    Attributes:
        plain: The plain question.
        attacks: Every attack setting.
        parts: The unlearned system without parts that can be taken away.
        answers: Shown answers by system and (split, record): text and outcome class.
        samples: The same of questions that were to be kept, to see whether the system is broken.
        notes: What was left out while asking.
    """

    splits: Mapping[str, Sequence[RecordBase]]
    metrics: Sequence[ItemMetric | SummaryMetric]
    seed: int
    plain: Setting
    attacks: Sequence[Setting]
    parts: list[Setting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    depth: Depth | None = None
    infos: dict[SystemRole, SystemInfo] = field(default_factory=dict)
    answers: dict[SystemRole, Answers] = field(default_factory=dict)
    samples: dict[SystemRole, Answers] = field(default_factory=dict)

    @property
    def settings(self) -> list[Setting]:
        """The plain question first, then parts taken away, then every attack."""
        return [self.plain, *self.parts, *self.attacks]

    def result(self, seconds: float, measured: dict[str, int]) -> AuditResult:
        """Everything that can be said."""
        plain, with_reference = self.plain, "reference" in self.infos
        leaks = [
            leak(place, plain, with_reference=with_reference, seed=self.seed)
            for place in self.settings
        ]
        first = 1 + len(self.parts)
        attacked = leaks[first:]
        kept = utility(plain.values, self.splits, self.samples, self.seed)
        return AuditResult(
            systems=self.infos,
            splits={name: len(records) for name, records in self.splits.items()},
            depth=self.depth,
            measurements=[
                measurement
                for place in self.settings
                for role, values in place.values.items()
                if place.attack != WITHOUT_PART
                or role == "unlearned"  # the others are the plain ones
                for measurement in self._measurements(role, place, values)
            ],
            summaries=self._summaries(plain),
            outcomes=self._outcomes(plain),
            leaks=leaks,
            utility=kept,
            full_stack=full_stack(plain, self.attacks, kept),
            cheapest=cheapest_sentence(attacked),
            verdict=verdict(
                leaks[0],
                [one for one in attacked if one.weighs],
                kept,
                parts=leaks[1:first],
                without_reference=not with_reference,
                over_forgotten=self._over_forgotten(),
                white_box="weights" in self.infos["unlearned"].capabilities,
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

    def _over_forgotten(self) -> float | None:
        """The forget answers' probability as a share of an unknown answer's, if far below."""
        known = compared(
            self.plain, "answer_probability", with_reference="reference" in self.infos
        ).known
        return None if known is None else over_forgotten(known.unlearned, known.floor, self.seed)

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
        axis: Literal["step", "layer"]
        for place in self.settings:
            for axis, metric, lines in (
                ("step", "answer_probability", place.curves),
                ("layer", INSIDE, place.layers),
            ):
                steps = sorted({step for points in lines.values() for step, _ in points})
                if len(steps) < 2:
                    continue
                curves.append(
                    Curve(
                        attack=place.attack,
                        variant=place.variant,
                        metric=metric,
                        axis=axis,
                        steps=steps,
                        values={
                            role: [dict(points).get(step) for step in steps]
                            for role, points in lines.items()
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
                    question=prompt.messages[-1].text,
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
        skipped = self.plain.values["unlearned"].skipped
        lines += [f"Metric {name}: {reason}." for name, reason in skipped.items()]
        return lines + list(_NEVER_TESTED)


def write_items(path: Path, settings: Sequence[Setting]) -> None:
    """One row per system, attack, metric, split and record.

    ``record`` is the record's place among those that were asked; of a forget record among all of
    them, also under an attack that is judged on some only (probes that an attack made itself are
    counted by themselves). ``subject`` is whom a forget record is about, ``forms`` are the values
    of the forms in which an attack asked it.

    Args:
        settings: The plain question first.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    kinds = {
        **dict.fromkeys(("system", "attack", "variant", "metric", "split"), arrow.string()),
        "subject": arrow.string(), "record": arrow.int64(), "value": arrow.float64(),
        "forms": arrow.list_(arrow.float64()), "reason": arrow.string(), "detail": arrow.string(),
    }  # fmt: skip
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    asked = [record.digest for record in settings[0].records]
    for place in settings:
        own = [record.digest for record in place.records]
        judged = places(asked, own) if set(own) <= set(asked) else list(range(len(own)))
        for role, values in place.values.items():
            for metric, by_split in values.items.items():
                for split, items in by_split.items():
                    for number, item in enumerate(items):
                        forgotten = split == "forget"
                        record = judged[number] if forgotten else number
                        about = place.records[number].subject if forgotten else None
                        row = (
                            role, place.attack, place.variant, metric, split, about, record,
                            item.value, list(item.forms), item.reason, item.detail,
                        )  # fmt: skip
                        for column, value in zip(columns.values(), row, strict=True):
                            column.append(value)
    table = arrow.table({name: arrow.array(columns[name], kinds[name]) for name in kinds})
    with atomic_file(path, "wb") as handle:
        parquet.write_table(table, handle)
