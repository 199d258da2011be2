"""The audit: the same questions and attacks to the unlearned system, the original and the
reference, and what can be said from the answers."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from delible import registry
from delible.attacks.base import AttackContext, ModelAttack, PromptAttack
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
from delible.component import build
from delible.errors import DataError, DelibleError, ModelError, RecipeError, nearest
from delible.files import atomic_file, write_json
from delible.lm.embedded import cache_folder
from delible.lm.lm import LM
from delible.measure.asking import answer_of, ask
from delible.measure.cache import Cache
from delible.measure.evaluate import DETAIL_SEPARATOR, bootstrap_interval, evaluate, item_metrics
from delible.measure.requests import System
from delible.metrics.base import Item, ItemMetric, SummaryMetric, SystemValues
from delible.records import ForgetRequest, RecordBase, digest
from delible.rundir import RunDirectory

Say = Callable[[str], None]
Splits = dict[str, Sequence[RecordBase]]

#: What is measured when nothing is chosen.
DEFAULT_METRICS = (
    "answer_probability",
    "rouge_l_recall",
    "exact_memorisation",
    "extraction_strength",
    "truth_ratio",
    "outcome",
    "forget_quality",
    "model_utility",
)
DEFAULT_ATTACKS = ("paraphrase", "prefix", "prefill", "relearn", "quantize")
#: Knowledge scores of the attack x leak matrix, larger = more is known; the first one that a
#: system allows decides the verdict.
LEAK_MEASURES = ("answer_probability", "extraction_strength", "rouge_l_recall", "outcome")
#: Records per split that are asked, and retain records that are asked under attack.
ROWS, ATTACKED_RETAIN = 200, 8
#: Held-out records that a curve is measured on.
CURVE_ROWS = 16
#: Examples per split in the report.
EXAMPLES = 6
#: Forget answers this much less likely than in the reference count as over-forgotten.
OVER_FORGOTTEN = 0.25


def _quiet(_: str) -> None:
    """Says nothing."""


def audit(
    system: str | System,
    request: ForgetRequest,
    *,
    before: str | LM | None = None,
    reference: str | LM | None = None,
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    attacks: Sequence[str | Mapping[str, Any]] | None = None,
    leaks: Sequence[str] = LEAK_MEASURES,
    guard: str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    cache: bool = True,
    rows: int = ROWS,
    say: Say = _quiet,
    progress: Callable[[str, int, int], None] | None = None,
) -> AuditResult:
    """Asks and attacks a system, and says what is left of what it was to forget.

    Args:
        system: The unlearned system: a model's name or folder, or any :class:`System`.
        request: What was to be forgotten; retain, neighbour and holdout records make the audit
            stronger.
        before: The model before unlearning.
        reference: A model trained without the forgotten records.
        metrics: Names or ``{"name": …, option: value}``; None takes the standard ones.
        attacks: Names or ``{"name": …, option: value}``; None takes the standard ones, an empty
            list none.
        leaks: Metrics that are measured under attack, as knowledge scores (larger = more known).
        guard: Name of a guard to put in front of the system (and of no other).
        out: Run directory for ``metrics.json``, ``items.parquet`` and ``report.html``.
        cache: Take answers of the same weights to the same questions from earlier audits.
        rows: Records per split that are asked at most.

    Raises:
        DelibleError: Nothing to ask about, an unknown name, or a model that cannot be read.
    """
    return _Audit(
        system,
        request,
        before,
        reference,
        metrics,
        attacks,
        leaks,
        guard,
        out,
        seed,
        cache,
        rows,
        say,
        progress,
    ).run()


@dataclass
class _Found:
    """Values of one attack setting, by system."""

    attack: str
    variant: str
    title: str
    values: dict[SystemRole, SystemValues] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    curves: dict[SystemRole, list[tuple[int, float | None]]] = field(default_factory=dict)


class _Audit:
    def __init__(
        self,
        system: str | System,
        request: ForgetRequest,
        before: str | LM | None,
        reference: str | LM | None,
        metrics: Sequence[str | Mapping[str, Any]] | None,
        attacks: Sequence[str | Mapping[str, Any]] | None,
        leaks: Sequence[str],
        guard: str | None,
        out: Path | str | None,
        seed: int,
        cache: bool,
        rows: int,
        say: Say,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.began = time.perf_counter()
        self.seed, self.say, self.progress, self.request = seed, say, progress, request
        self.cache = Cache(cache_folder() / "answers") if cache else None
        self.metrics = self._metrics(metrics)
        self.attacks = self._attacks(attacks)
        self.leaks = self._leaks(leaks)
        self.out = None if out is None else RunDirectory(out)
        self.not_tested: list[str] = []
        self.splits = self._splits(rows)
        self.systems = self._systems(system, before, reference, guard)
        self.measured: dict[str, int] = {}

    # ---- what is asked of whom

    def _metrics(
        self, specs: Sequence[str | Mapping[str, Any]] | None
    ) -> list[ItemMetric | SummaryMetric]:
        return [
            build("metric", spec if isinstance(spec, str) else dict(spec))
            for spec in specs or DEFAULT_METRICS
        ]

    def _attacks(
        self, specs: Sequence[str | Mapping[str, Any]] | None
    ) -> list[PromptAttack | ModelAttack]:
        found: list[PromptAttack | ModelAttack] = []
        for spec in DEFAULT_ATTACKS if specs is None else specs:
            attack = build("attack", spec if isinstance(spec, str) else dict(spec))
            if isinstance(attack, ModelAttack) and isinstance(spec, str):
                found += [
                    build("attack", {"name": spec, **options}) for options in attack.variants()
                ]
            else:
                found.append(attack)
        return found

    def _splits(self, rows: int) -> Splits:
        from delible.world import general

        request = self.request
        if not request.forget:
            raise DataError(
                "an audit asks about forget records, and there are none.",
                hint="Add --forget FILE with questions about what was to be forgotten.",
            )
        splits: Splits = {}
        for name in ("forget", "retain", "neighbours", "holdout"):
            records = getattr(request, name)
            if len(records) > rows:
                step = len(records) / rows
                splits[name] = [records[int(index * step)] for index in range(rows)]
                self.not_tested.append(
                    f"Only {rows} of {len(records)} {name} records were asked (evenly spaced)."
                )
            elif records:
                splits[name] = records
        splits["general"] = general()[:rows]
        return splits

    def _systems(
        self,
        system: str | System,
        before: str | LM | None,
        reference: str | LM | None,
        guard: str | None,
    ) -> dict[SystemRole, Callable[[], System]]:
        """Loaders, so that no more than two models are in memory at once."""

        def loader(given: str | System) -> Callable[[], System]:
            if isinstance(given, str):
                if given.startswith(("http://", "https://")):
                    raise ModelError(
                        "auditing an endpoint is not supported in this version.",
                        where=given,
                        hint="Give a model folder or a hub id.",
                    )
                return lambda: LM.load(given)
            return lambda: given

        unlearned = loader(system)
        if guard is not None:
            unguarded, name = unlearned, guard

            def guarded() -> System:
                from delible.guards import guard as put_before

                return put_before(unguarded(), self.request, name)

            unlearned = guarded
        systems: dict[SystemRole, Callable[[], System]] = {"unlearned": unlearned}
        for role, given in (("original", before), ("reference", reference)):
            if given is None:
                self.not_tested.append(_WITHOUT[role])
            else:
                systems[cast(SystemRole, role)] = loader(given)
        return systems

    # ---- the run

    def run(self) -> AuditResult:
        found = [_Found("none", "", "Asked plainly")]
        found += [
            _Found(attack.card.name, _variant(attack), attack.card.title) for attack in self.attacks
        ]
        infos: dict[SystemRole, SystemInfo] = {}
        examples: dict[SystemRole, dict[tuple[str, int], tuple[str, str]]] = {}
        for role, load in self.systems.items():
            system = load()
            infos[role] = SystemInfo(
                name=system.name,
                capabilities=sorted(system.capabilities),
                fingerprint=system.fingerprint,
            )
            self.say(f"Asking the {role} system.")
            found[0].values[role] = self._evaluate(system, self.splits, self.metrics, role)
            examples[role] = self._answers(system)
            for attack, place in zip(self.attacks, found[1:], strict=True):
                self._attack(role, system, attack, place)
            del system
            gc.collect()
        result = self._result(infos, found, examples)
        if self.out is not None:
            self._write(result, found)
        return result

    def _evaluate(
        self,
        system: System,
        splits: Splits,
        metrics: Sequence[ItemMetric | SummaryMetric],
        title: str,
        rewrite: Any = None,
        *,
        cached: bool = True,
    ) -> SystemValues:
        def show(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(title, done, total)

        values = evaluate(
            system, splits, metrics, rewrite=rewrite, cache=self.cache if cached else None,
            progress=show,
        )  # fmt: skip
        for key, count in values.measured.items():
            self.measured[key] = self.measured.get(key, 0) + count
        return values

    def _leaks(self, names: Sequence[str]) -> list[ItemMetric]:
        """The knowledge scores that are measured under attack, among the chosen metrics."""
        wanted = item_metrics(self.metrics)
        for name in names:
            if name not in LEAK_MEASURES:
                raise RecipeError(
                    f"'{name}' is no knowledge score.", hint=nearest(name, LEAK_MEASURES)
                )
        return [wanted[name] for name in LEAK_MEASURES if name in wanted and name in names]

    def _attacked_retain(self) -> Sequence[RecordBase]:
        records = self.splits.get("retain") or self.splits.get("neighbours") or ()
        step = max(1, len(records) // ATTACKED_RETAIN)
        return records[::step][:ATTACKED_RETAIN]

    def _attack(
        self, role: SystemRole, system: System, attack: PromptAttack | ModelAttack, place: _Found
    ) -> None:
        began = time.perf_counter()
        splits: Splits = {"forget": self.splits["forget"], "retain": self._attacked_retain()}
        title = f"{role}: {place.title}{f' ({place.variant})' if place.variant else ''}"
        if isinstance(attack, PromptAttack):
            self.say(f"{title}.")
            place.values[role] = self._evaluate(system, splits, self.leaks, title, attack.prompts)
        elif not isinstance(system, LM):
            place.notes["skipped"] = (
                f"the {role} system gives no weights, so this attack cannot be run on it"
            )
        else:
            self._attack_weights(role, system, attack, place, splits, title)
        place.seconds += time.perf_counter() - began

    def _attack_weights(
        self,
        role: SystemRole,
        lm: LM,
        attack: ModelAttack,
        place: _Found,
        splits: Splits,
        title: str,
    ) -> None:
        curve: list[tuple[int, float | None]] = []
        context = self._context(role, curve)
        try:
            splits["forget"] = attack.held_out(context)
        except DelibleError as error:
            place.notes["skipped"] = f"not run: {error}"
            return
        self._held = splits["forget"][:CURVE_ROWS]
        key = self._key(lm, attack, splits)
        kept = self._kept(key)
        if kept is not None:
            self.say(f"{title}: known from an earlier audit.")
            place.values[role], place.curves[role], notes = kept
        else:
            self.say(f"{title}.")
            try:
                attacked = attack.apply(lm, context)
            except DelibleError as error:
                place.notes["skipped"] = f"not run: {error}"
                return
            place.values[role] = self._evaluate(attacked, splits, self.leaks, title, cached=False)
            place.curves[role] = curve
            notes = dict(context.notes)
            self._keep(key, place.values[role], curve, notes)
            del attacked
            gc.collect()
        if role == "unlearned":
            place.notes.update(notes)

    def _context(self, role: SystemRole, curve: list[tuple[int, float | None]]) -> AttackContext:
        from delible.world import unrelated

        original = None
        if role == "unlearned" and "original" in self.systems:
            loaded = self._original()
            original = loaded if isinstance(loaded, LM) else None

        def observe(lm: LM, step: int) -> None:
            metric = build("metric", "answer_probability")
            values = evaluate(lm, {"forget": self._held}, [metric])
            curve.append((step, values.means["answer_probability"]["forget"]))

        return AttackContext(
            forget=self.splits["forget"],
            retain=self.splits.get("retain") or self.splits.get("neighbours") or (),
            unrelated=unrelated(),
            original=original,
            seed=self.seed,
            say=self.say,
            observe=observe,
        )

    _loaded_original: System | None = None
    #: Records that the running attack's curve is measured on.
    _held: Sequence[RecordBase] = ()

    def _original(self) -> System:
        if self._loaded_original is None:
            self._loaded_original = self.systems["original"]()
            self.systems["original"] = lambda: cast(System, self._loaded_original)
        return self._loaded_original

    # ---- attacked systems of earlier audits

    def _key(self, lm: LM, attack: ModelAttack, splits: Splits) -> str:
        context = {
            "fingerprint": lm.fingerprint,
            "attack": attack.spec(),
            "seed": self.seed,
            "splits": {name: digest(records) for name, records in splits.items()},
            "all": digest(self.splits["forget"]),
            "retain": digest(self.splits.get("retain", ())),
            "metrics": [metric.spec() for metric in self.leaks],
        }
        return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()

    def _kept(
        self, key: str
    ) -> tuple[SystemValues, list[tuple[int, float | None]], dict[str, Any]] | None:
        if self.cache is None:
            return None
        path = self.cache.folder / "attacks" / f"{key}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        items = {
            metric: {split: [Item(*item) for item in row] for split, row in by_split.items()}
            for metric, by_split in content["items"].items()
        }
        values = SystemValues(content["system"], items, content["means"])
        return values, [tuple(point) for point in content["curve"]], content["notes"]

    def _keep(
        self,
        key: str,
        values: SystemValues,
        curve: list[tuple[int, float | None]],
        notes: dict[str, Any],
    ) -> None:
        if self.cache is None:
            return
        items = {
            metric: {
                split: [[item.value, item.reason, item.detail] for item in row]
                for split, row in by_split.items()
            }
            for metric, by_split in values.items.items()
        }
        content = {
            "system": values.system, "items": items, "means": values.means, "curve": curve,
            "notes": notes,
        }  # fmt: skip
        write_json(self.cache.folder / "attacks" / f"{key}.json", content)

    # ---- what can be said

    def _answers(self, system: System) -> dict[tuple[str, int], tuple[str, str]]:
        chosen = [metric for metric in self.metrics if metric.card.name == "outcome"]
        metric = cast(ItemMetric, chosen[0] if chosen else build("metric", "outcome"))
        found: dict[tuple[str, int], tuple[str, str]] = {}
        for split in ("forget", "retain"):
            records = self.splits.get(split, ())
            step = max(1, len(records) // EXAMPLES)
            for index in range(0, min(len(records), step * EXAMPLES), step):
                found[split, index] = ("", "")
        splits: Splits = {}
        for split, index in found:
            splits[split] = [*splits.get(split, ()), self.splits[split][index]]
        places = {split: [index for name, index in found if name == split] for split in splits}
        for split, records in splits.items():
            from delible.measure.engine import measure

            for index, record in zip(places[split], records, strict=True):
                prompt = metric.prompt(record)
                if prompt is None:
                    continue
                requests = list(metric.requests(record, prompt))
                answers = measure(system, requests, cache=self.cache)
                item = metric.score(record, prompt, answers)
                text = next((str(answers[r]) for r in requests if isinstance(answers[r], str)), "")
                found[split, index] = (text, item.detail or "")
        return found

    def _result(
        self,
        infos: dict[SystemRole, SystemInfo],
        found: list[_Found],
        answers: dict[SystemRole, dict[tuple[str, int], tuple[str, str]]],
    ) -> AuditResult:
        plain = found[0]
        summaries = self._summaries(plain)
        leaks = [self._leak(place, plain) for place in found]
        measure = next(
            (name for name in LEAK_MEASURES if leaks[0].erased.get(name) is not None),
            LEAK_MEASURES[0],
        )
        without_reference = "reference" not in self.systems
        return AuditResult(
            systems=infos,
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
                without_reference=without_reference,
                over_forgotten=self._over_forgotten(plain),
            ),
            curves=self._curves(found),
            examples=self._examples(answers),
            not_tested=[*self.not_tested, *self._untested(found)],
            seconds=round(time.perf_counter() - self.began, 1),
            measured=self.measured,
        )

    def _summaries(self, plain: _Found) -> dict[SystemRole, dict[str, float | None]]:
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

    def _leak(self, place: _Found, plain: _Found) -> Leak:
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
            if floor is None and "reference" not in self.systems:
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

    def _unknown_topic(self, plain: _Found, measure: str) -> float | None:
        """Without a reference: what the original scores on records it never saw."""
        held = self._mean(plain, "original", measure, "holdout")
        return held if held is not None else None

    @staticmethod
    def _mean(place: _Found, role: SystemRole, measure: str, split: str) -> float | None:
        values = place.values.get(role)
        return values.means.get(measure, {}).get(split) if values is not None else None

    def _utility_kept(
        self, summaries: Mapping[SystemRole, Mapping[str, float | None]], plain: _Found
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

    def _over_forgotten(self, plain: _Found) -> bool:
        mine = self._mean(plain, "unlearned", "answer_probability", "forget")
        never = self._mean(plain, "reference", "answer_probability", "forget")
        return mine is not None and never is not None and mine < OVER_FORGOTTEN * never

    def _measurements(
        self, role: SystemRole, place: _Found, values: SystemValues
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
    def _outcomes(plain: _Found) -> dict[SystemRole, dict[str, dict[str, float]]]:
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

    def _curves(self, found: Sequence[_Found]) -> list[Curve]:
        curves = []
        for place in found:
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

    def _examples(
        self, answers: dict[SystemRole, dict[tuple[str, int], tuple[str, str]]]
    ) -> list[Example]:
        examples = []
        for split, index in answers["unlearned"]:
            record = self.splits[split][index]
            prompt = ask(record)
            if prompt is None or not prompt.messages:
                continue
            examples.append(
                Example(
                    split=split,
                    question=prompt.messages[-1].content,
                    expected=answer_of(record),
                    answers={role: found[split, index][0] for role, found in answers.items()},
                    outcomes={role: found[split, index][1] for role, found in answers.items()},
                )
            )
        return examples

    def _untested(self, found: Sequence[_Found]) -> list[str]:
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

    # ---- the files

    def _write(self, result: AuditResult, found: Sequence[_Found]) -> None:
        assert self.out is not None
        if not self.out.manifest:
            self.out.begin(
                {
                    "command": "audit",
                    "system": result.systems["unlearned"].model_dump(),
                    "seed": self.seed,
                    "forget": digest(self.request.forget),
                    "metrics": [metric.spec() for metric in self.metrics],
                    "attacks": [attack.spec() for attack in self.attacks],
                }
            )
        write_items(self.out.path / "items.parquet", found)
        with atomic_file(self.out.path / "metrics.json") as handle:
            handle.write(result.model_dump_json(indent=2))
        if self.out.manifest.get("status") != "done":
            self.out.finish(cost={"seconds": result.seconds})
        from delible.report import read_run, write

        write(read_run(self.out.path), self.out.path / "report.html")


def write_items(path: Path, found: Sequence[_Found]) -> None:
    """One row per system, attack, metric, split and record."""
    import pyarrow as arrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "system", "attack", "variant", "metric", "split", "record", "value", "reason", "detail",
        )
    }  # fmt: skip
    for place in found:
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


def _variant(attack: PromptAttack | ModelAttack) -> str:
    return attack.variant_title() if isinstance(attack, ModelAttack) else ""


def check_names(metrics: Sequence[str], attacks: Sequence[str]) -> None:
    """Refuses unknown names before anything is loaded."""
    for kind, names in (("metric", metrics), ("attack", attacks)):
        known = [card.name for card in registry.cards(cast(Any, kind))]
        for name in names:
            if name not in known:
                raise RecipeError(f"unknown {kind} '{name}'.", hint=nearest(name, known))


_WITHOUT = {
    "original": "The original model was not given (--before), so nothing is compared with it.",
    "reference": (
        "No model trained without the forgotten records was given (--reference), so what "
        "unlearning should reach is not known exactly."
    ),
}

_NEVER_TESTED = (
    "Longer relearning, other optimisers and other learning rates than the listed ones.",
    "Adversarial suffixes found by search (GCG) and attacks with another model as attacker.",
    "Traces inside the model: patching, probing and direction ablation.",
    "Other languages and conversations of several turns.",
)
