"""``delible report``: a run and its audit, or several runs, as one self-contained HTML page.

The page needs no network, no fonts and no other file, and reads well without JavaScript. The
prose is in ``template.html.j2``, the looks in ``style.css``, the drawing in ``charts.py``; this
file turns a run's data into what they show. The same data give the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from delible.audit.result import AuditResult, Curve, Example, Leak, Measurement, SystemRole
from delible.report import charts, html
from delible.report.html import environment, number, pretty
from delible.report.reading import ROLES, ReportData, lookup, named

OUTCOMES = ("correct", "refusal", "wrong-but-fluent", "garbage")
#: Metrics that can stand for "how probable is the right answer", best first.
PROBABILITY = ("answer_probability", "probability", "normalised_probability")
EXAMPLES_SHOWN = 8


def _split(audit: AuditResult, start: str) -> str | None:
    """The split of that name, else the first whose name starts so (``forget10``)."""
    names = [*audit.splits, *(row.split for row in audit.measurements)]
    return next(
        (name for name in names if name == start),
        next((name for name in names if name.startswith(start)), None),
    )


# --- key numbers ---------------------------------------------------------------------------


@dataclass
class KeyNumbers:
    """The numbers of one run that a reader wants first (``None`` = cannot be said)."""

    metric: str | None = None
    forget: dict[SystemRole, Measurement] = field(default_factory=dict)
    retain: dict[SystemRole, Measurement] = field(default_factory=dict)
    kept: float | None = None
    utility: dict[SystemRole, float | None] = field(default_factory=dict)
    forget_quality: float | None = None
    weakest: float | None = None
    weakest_title: str = ""
    seconds: float | None = None
    audit_seconds: float | None = None


def key_numbers(data: ReportData) -> KeyNumbers:
    """Picks the key numbers out of a run."""
    found = KeyNumbers(seconds=_training_seconds(data.manifest))
    audit = data.audit
    if audit is None:
        return found
    found.audit_seconds = audit.seconds or None
    forget, retain = _split(audit, "forget"), _split(audit, "retain")
    plain = [row for row in audit.measurements if row.attack == "none"]
    on_forget = [row.metric for row in plain if row.split == forget]
    found.metric = next(
        (name for name in PROBABILITY if name in on_forget), on_forget[0] if on_forget else None
    )
    for row in plain:
        if row.metric == found.metric:
            for split, place in ((forget, found.forget), (retain, found.retain)):
                if row.split == split:
                    place.setdefault(row.system, row)
    before, after = (
        found.retain[role].value if role in found.retain else None
        for role in ("original", "unlearned")
    )
    if before is not None and after is not None and before > 0:
        found.kept = 100 * after / before
    for role in ROLES:
        if "model_utility" in audit.summaries.get(role, {}):
            found.utility[role] = audit.summaries[role]["model_utility"]
    found.forget_quality = audit.summaries.get("unlearned", {}).get("forget_quality")
    attacked = [
        (erased, leak.name, measure)
        for leak in audit.leaks
        if leak.attack != "none"
        for measure, erased in leak.erased.items()
        if erased is not None and charts.finite(erased)
    ]
    if attacked:
        found.weakest, title, measure = min(attacked)
        found.weakest_title = f"{title}, {pretty(measure, capital=False)}"
    return found


def _training_seconds(manifest: dict[str, Any]) -> float | None:
    cost = manifest.get("cost")
    if isinstance(cost, dict):
        for key in ("seconds", "total_seconds", "training_seconds"):
            if charts.finite(cost.get(key)):
                return float(cost[key])
    try:
        start = datetime.fromisoformat(str(manifest["started"]))
        return (datetime.fromisoformat(str(manifest["ended"])) - start).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None


def _cost_lines(manifest: dict[str, Any]) -> list[str]:
    """Cost and hardware in words, whatever the manifest holds."""
    result = []
    cost, hardware = manifest.get("cost"), manifest.get("hardware")
    if isinstance(cost, dict):
        for key, value in cost.items():
            if charts.finite(value) and value and not key.endswith("seconds"):
                text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
                result.append(f"{pretty(key, capital=False)}: {text}")
    if isinstance(hardware, str):
        result.append(hardware)
    elif isinstance(hardware, dict):
        machine = [str(hardware[key]) for key in ("accelerator", "machine") if hardware.get(key)]
        for key, word in (("processors", "processors"), ("memory_gib", "GiB memory")):
            if charts.finite(hardware.get(key)):
                machine.append(f"{hardware[key]:g} {word}")
        result.append(", ".join(machine))
    return [line for line in result if line]


# --- parts of the page ---------------------------------------------------------------------


def _forget_utility(audit: AuditResult) -> dict[str, Any] | None:
    """The forget-versus-utility chart and the key to its numbered marks."""
    measures = [name for leak in audit.leaks for name in leak.knowledge if name in leak.retain]
    measure = next((name for name in PROBABILITY if name in measures), None) or next(
        iter(measures), None
    )
    points: list[charts.Point] = []
    key: list[dict[str, Any]] = []
    plain: dict[SystemRole, tuple[float, float]] = {}
    retain_name = "Retain knowledge"
    if measure is not None:
        for leak in audit.leaks:
            for role in ROLES:
                x = leak.knowledge.get(measure, {}).get(role)
                y = leak.retain.get(measure, {}).get(role)
                if x is None or y is None or not (charts.finite(x) and charts.finite(y)):
                    continue
                if leak.attack == "none":
                    plain.setdefault(role, (x, y))
                elif role == "unlearned":
                    mark = str(len(key) + 1)
                    name = leak.title + (f" ({leak.variant})" if leak.variant else "")
                    key.append({"mark": mark, "name": name, "x": x, "y": y})
                    points.append(
                        charts.Point(
                            x, y, role, mark, f"{name}: forget {x:.2f}, retain {y:.2f}", small=True
                        )
                    )
    if not plain:
        found = key_numbers(ReportData(title="", audit=audit))
        measure = found.metric
        for role in ROLES:
            x = found.forget[role].value if role in found.forget else None
            y = found.retain[role].value if role in found.retain else None
            if y is None and not found.retain and found.utility.get(role) is not None:
                y, retain_name = found.utility[role], "Model utility"
            if x is not None and y is not None and charts.finite(x) and charts.finite(y):
                plain[role] = (x, y)
    for role, (x, y) in plain.items():
        points.append(
            charts.Point(x, y, role, role, f"{role}: forget {x:.2f}, {retain_name} {y:.2f}")
        )
    if len(points) < 2 or measure is None:
        return None
    thresholds = audit.verdict.thresholds if audit.verdict else {}
    kept = next((value for name, value in thresholds.items() if "utility" in name), 0.9)
    ideal = None
    if "original" in plain:
        aim = plain.get("reference", (0.0, 0.0))[0]
        reach = next((value for name, value in thresholds.items() if "plain" in name), 0.8)
        ideal = (aim + (1 - reach) * (plain["original"][0] - aim), kept * plain["original"][1])
    name = pretty(measure, capital=False)
    said = "; ".join(f"{role} {x:.2f} and {y:.2f}" for role, (x, y) in plain.items())
    return {
        "svg": charts.scatter(
            points,
            identifier="trade",
            title="Forgetting against utility",
            description=f"Forget and retain {name}: {said}. {len(key)} attacked versions.",
            x_label=f"Forget knowledge: {name}  (← lower is better)",
            y_label=f"{retain_name}  (↑ higher is better)",
            ideal=ideal,
        ),
        "key": key,
        "measure": name,
        "retain_name": retain_name,
        "ideal": ideal,
        "kept": kept,
    }


def _outcomes(audit: AuditResult) -> list[dict[str, Any]]:
    splits: dict[str, None] = {}
    for by_split in audit.outcomes.values():
        splits.update(dict.fromkeys(by_split))
    result = []
    for index, split in enumerate(splits):
        rows = [
            charts.Bar(role, audit.outcomes[role][split])
            for role in ROLES
            if split in audit.outcomes.get(role, {})
        ]
        extra = [name for bar in rows for name in bar.shares if name not in OUTCOMES]
        said = "; ".join(
            f"{bar.label}: "
            + ", ".join(f"{name} {share:.0%}" for name, share in bar.shares.items())
            for bar in rows
        )
        result.append(
            {
                "split": split,
                "count": audit.splits.get(split),
                "svg": charts.stacked_bars(
                    rows,
                    [*OUTCOMES, *dict.fromkeys(extra)],
                    identifier=f"outcomes-{index}",
                    title=f"Outcomes on {split}",
                    description=said,
                ),
            }
        )
    return result


def _step(erased: float | None) -> int | None:
    """The colour step of e: five steps, cut where the verdict's thresholds are (0.5 and 0.8)."""
    if erased is None or not charts.finite(erased):
        return None
    return sum(erased >= cut for cut in (0.25, 0.5, 0.8, 0.95))


def _matrix(audit: AuditResult) -> dict[str, Any] | None:
    if not audit.leaks:
        return None
    measures = list(
        dict.fromkeys(name for leak in audit.leaks for name in [*leak.knowledge, *leak.erased])
    )
    ranges: dict[str, tuple[float, float]] = {}
    for measure in measures:
        values = [
            value
            for leak in audit.leaks
            for value in leak.knowledge.get(measure, {}).values()
            if value is not None and charts.finite(value)
        ]
        inside = not values or (min(values) >= 0 and max(values) <= 1)
        ranges[measure] = (0.0, 1.0) if inside else (min(values), max(values))
    rows = []
    for leak in audit.leaks:
        cells = []
        for measure in measures:
            known = leak.knowledge.get(measure, {})
            erased = leak.erased.get(measure)
            reason = None
            if measure not in leak.knowledge:
                reason = "this measure was not taken under this attack"
            elif erased is None:
                reason = (
                    leak.no_power.get(measure)
                    or leak.note
                    or "e needs the original's score to lie above the reference's"
                )
            cells.append(
                {
                    "erased": erased,
                    "step": _step(erased),
                    "known": known,
                    "reason": reason,
                    "powerless": (reason or "").startswith("no power"),
                    "interval": leak.intervals.get(measure),
                    "micro": charts.micro_range(
                        cast(dict[str, float | None], known), *ranges[measure]
                    ),
                }
            )
        retain = next(
            (
                leak.retain[measure].get("unlearned")
                for measure in measures
                if measure in leak.retain
            ),
            None,
        )
        rows.append({"leak": leak, "cells": cells, "retain": retain, "worst": _worst(leak)})
    retained = next(
        (name for name in measures if any(name in leak.retain for leak in audit.leaks)), None
    )
    return {"measures": measures, "rows": rows, "retained": retained, "roles": _roles(audit)}


def _worst(leak: Leak) -> list[str]:
    """The form, the subject and the facts of a row that leak most."""
    found = []
    form, subject, left = leak.worst_form, leak.worst_subject, leak.facts_left
    if form is not None:
        found.append(
            f"worst form: no. {form.form}, e = {form.erased:.2f} "
            f"({pretty(form.measure, capital=False)})"
        )
    if subject is not None and subject.erased < 1:
        found.append(
            f"worst subject: {subject.subject}, e = {subject.erased:.2f}, {subject.untouched} of "
            f"{subject.records} facts as before ({pretty(subject.measure, capital=False)})"
        )
    if left is not None and left.count:
        found.append(
            f"{left.count} of {left.comparable} facts as before "
            f"({pretty(left.measure, capital=False)})"
        )
    return found


def _roles(audit: AuditResult) -> list[SystemRole]:
    return [role for role in ROLES if role in audit.systems]


def _curves(curves: Sequence[Curve], titles: dict[str, str]) -> list[dict[str, Any]]:
    panels = []
    for index, curve in enumerate(curves):
        title = titles.get(curve.attack, pretty(curve.attack)) + (
            f", {curve.variant}" if curve.variant else ""
        )
        series = [
            charts.Line(
                role, role, curve.steps[: len(curve.values[role])],
                curve.values[role][: len(curve.steps)],
            )
            for role in ROLES
            if role in curve.values
        ]  # fmt: skip
        svg = charts.lines(
            series,
            identifier=f"curve-{index}",
            title=f"{title}: {pretty(curve.metric)}",
            description="; ".join(
                f"{line.label} from {number(line.ys[0])} to {number(line.ys[-1])}"
                for line in series
                if line.ys
            ),
            x_label="Attack steps",
            y_label=pretty(curve.metric),
            from_zero=True,
        )
        if svg is not None:
            panels.append({"title": title, "svg": svg})
    return panels


def _training(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    panels, missing = [], 0
    # a resumed run repeats the steps after its last checkpoint: the later event counts
    by_step = {event["step"]: event for event in events if charts.finite(event.get("step"))}
    steps = [by_step[step] for step in sorted(by_step)]
    wanted = (
        ("forget_loss", "Forget loss", "forget"),
        ("keep_loss", "Keep loss", "keep"),
        ("learning_rate", "Learning rate", "plain"),
        ("tokens_per_second", "Tokens per second", "plain"),
    )
    for name, title, kind in wanted:
        rows = [event for event in steps if name in event]
        values = [float(r[name]) if charts.finite(r[name]) else None for r in rows]
        missing += sum(value is None for value in values) if name.endswith("loss") else 0
        drawn = [value for value in values if value is not None]
        svg = charts.lines(
            [charts.Line(title, kind, [float(r["step"]) for r in rows], values)],
            identifier=f"training-{name}",
            title=title,
            description=f"from {number(drawn[0])} to {number(drawn[-1])}" if drawn else "",
            x_label="Training step",
            y_label=title,
            from_zero=name in ("tokens_per_second", "learning_rate"),
            named=False,
        )
        if svg is not None:
            panels.append({"title": title, "svg": svg})
    return {"panels": panels, "missing": missing} if panels else None


def _examples(data: ReportData) -> list[dict[str, Any]]:
    """Answers by split; those that the run itself kept when the audit has none."""
    found = list(data.audit.examples) if data.audit is not None else []
    kept = data.manifest.get("examples")
    if not found and isinstance(kept, list):
        for row in kept:
            if isinstance(row, dict):
                split, question, expected, before, after = (
                    str(row.get(key, ""))
                    for key in ("split", "question", "expected", "before", "after")
                )
                answers: dict[SystemRole, str] = {"original": before, "unlearned": after}
                found.append(
                    Example(split=split, question=question, expected=expected, answers=answers)
                )
    groups: dict[str, list[Example]] = {}
    for example in found:
        groups.setdefault(example.split, []).append(example)
    order = sorted(groups, key=lambda name: (not name.startswith("forget"), name != "retain", name))
    return [
        {
            "split": split,
            "first": groups[split][:EXAMPLES_SHOWN],
            "rest": groups[split][EXAMPLES_SHOWN:],
            "roles": [r for r in ROLES if any(r in example.answers for example in groups[split])],
        }
        for split in order
    ]


def _comparison(runs: Sequence[ReportData]) -> dict[str, Any] | None:
    if not runs:
        return None
    rows = []
    points = []
    for index, run in enumerate(runs, start=1):
        numbers = key_numbers(run)
        verdict = run.audit.verdict.label if run.audit and run.audit.verdict else None
        method = named(lookup(run.manifest, "method", "recipe"))
        after = numbers.forget.get("unlearned")
        rows.append(
            {
                "mark": index,
                "title": run.title,
                "method": method or run.title,
                "verdict": verdict,
                "forget": after.value if after else None,
                "reason": after.reason if after else None,
                "numbers": numbers,
                "utility": numbers.utility.get("unlearned"),
            }
        )
        kept = numbers.kept
        if after is not None and after.value is not None and kept is not None:
            points.append(
                charts.Point(
                    after.value, kept, "unlearned", method or str(index),
                    f"{run.title}: forget {after.value:.2f}, retain kept {kept:.0f} %", small=True,
                )
            )  # fmt: skip
    svg = None
    if len(points) > 1:
        svg = charts.scatter(
            points,
            identifier="compare",
            title="Runs compared",
            description="; ".join(point.title for point in points),
            x_label="Forget knowledge  (← lower is better)",
            y_label="Retain kept, %  (↑ higher is better)",
            include_y=(80.0, 100.0),
        )
    return {"rows": rows, "svg": svg}


def _terms(data: ReportData) -> set[str]:
    """Words that occur in the data; the glossary explains those that it knows."""
    words: set[str] = set()
    for run in [data, *data.runs]:
        if run.audit is not None:
            audit = run.audit
            words.update(row.metric for row in audit.measurements)
            words.update(row.attack for row in audit.measurements)
            words.update(name for leak in audit.leaks for name in [*leak.knowledge, leak.attack])
            words.update(leak.title for leak in audit.leaks)
            words.update(name for table in audit.summaries.values() for name in table)
            words.update(curve.attack for curve in audit.curves)
            words.update("e" for leak in audit.leaks if leak.erased)
            words.update("reference" for _ in audit.systems if "reference" in audit.systems)
            words.update("outcome" for _ in audit.outcomes)
    return {word.lower().replace("-", "_").replace(" ", "_") for word in words}


# --- rendering -----------------------------------------------------------------------------


def render(data: ReportData) -> str:
    """The page as HTML text. Everything from ``data`` is escaped; the same data, the same text."""
    audit, manifest = data.audit, data.manifest
    command = manifest.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    template = environment().get_template("template.html.j2")
    return template.render(
        data=data,
        audit=audit,
        verdict=audit.verdict if audit else None,
        numbers=key_numbers(data),
        cost=_cost_lines(manifest),
        comparison=_comparison(data.runs),
        trade=_forget_utility(audit) if audit else None,
        outcomes=_outcomes(audit) if audit else [],
        classes=OUTCOMES,
        matrix=_matrix(audit) if audit else None,
        curves=_curves(audit.curves, {leak.attack: leak.title for leak in audit.leaks})
        if audit
        else [],
        training=_training(data.events),
        examples=_examples(data),
        roles=_roles(audit) if audit else [],
        config=json.dumps(manifest, indent=2, ensure_ascii=False, default=str) if manifest else "",
        seeds=lookup(manifest, "seeds", "seed"),
        versions=manifest.get("versions"),
        command=command if isinstance(command, str) else None,
        terms=_terms(data),
    )


def write(data: ReportData, path: str | Path) -> Path:
    """Renders and writes the page; a reader never sees a half-written file.

    Raises:
        RunError: The file cannot be written.
    """
    return html.write(render(data), path)
