"""``delible report``: reads run directories and renders them as one self-contained HTML page.

The page needs no network, no fonts and no other file, and reads well without JavaScript. The
prose is in ``template.html.j2``, the looks in ``style.css``, the drawing in ``charts.py``; this
file turns a run's data into what they show. The same data give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup, escape
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delible.audit.result import AuditResult, Curve, Example, Measurement, SystemRole
from delible.errors import RunError
from delible.report import charts

ROLES: tuple[SystemRole, ...] = ("original", "unlearned", "reference")
OUTCOMES = ("correct", "refusal", "wrong-but-fluent", "garbage")
#: Metrics that can stand for "how probable is the right answer", best first.
PROBABILITY = ("answer_probability", "probability", "normalised_probability")
EXAMPLES_SHOWN = 8
NO_RECORD = "not measured in this audit"


class ReportData(BaseModel):
    """What a page is made of; every part may be missing.

    Attributes:
        story: Sentences in plain words: what was done.
        manifest: The run's manifest. The page reads ``command`` (text or list), ``method``,
            ``model`` and ``seed`` (there, in ``run`` or in ``config``), ``versions``,
            ``hardware``, ``cost`` (with ``seconds``), ``started``, ``ended``, ``stopped`` and
            ``examples`` where they are there, and prints all of it.
        events: Training events with ``step``, ``forget_loss``, ``keep_loss`` and others.
        runs: Several runs to compare; the page starts with a table of them.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    story: list[str] = Field(default_factory=list)
    manifest: dict[str, Any] = Field(default_factory=dict)
    events: list[dict[str, Any]] = Field(default_factory=list)
    audit: AuditResult | None = None
    notes: list[str] = Field(default_factory=list)
    runs: list[ReportData] = Field(default_factory=list)


# --- reading -------------------------------------------------------------------------------


def _json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("the file does not exist.", where=str(path), hint=hint) from None
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    except UnicodeDecodeError:
        raise RunError("is not UTF-8 text.", where=str(path), hint=hint) from None
    except json.JSONDecodeError as error:
        raise RunError(
            f"is not valid JSON ({error.msg}).", where=f"{path}:{error.lineno}", hint=hint
        ) from None


def read_events(path: Path, interruptions: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events of a run and the number of lines left out.

    A killed run leaves a half-written last line, and a resumed one writes on behind it.

    Args:
        interruptions: How often the run was resumed: so many broken lines are to be expected.

    Raises:
        RunError: More broken lines than that, or a file that cannot be read.
    """
    hint = "Delete the broken line, or run the training again."
    try:
        rows = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    while rows and not rows[-1].strip():
        rows.pop()
    events: list[dict[str, Any]] = []
    broken = 0
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            event = json.loads(row)
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.append(event)
            continue
        broken += 1
        if number < len(rows) and broken > interruptions:
            raise RunError("is not a JSON object.", where=f"{path}:{number}", hint=hint)
    return events, broken


def read_run(directory: str | Path) -> ReportData:
    """Reads ``manifest.json``, ``events.jsonl`` and ``metrics.json`` of a run directory.

    A run without events or without an audit is told as such on the page.

    Raises:
        RunError: No directory, no manifest, or a file that cannot be read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise RunError(
            "is not a directory.",
            where=str(folder),
            hint="Give the --out directory of 'delible unlearn' or 'delible audit'.",
        )
    manifest = _json(
        folder / "manifest.json",
        "Give the --out directory of 'delible unlearn' or 'delible audit'; "
        "every run writes this file at its start.",
    )
    if not isinstance(manifest, dict):
        raise RunError(
            "is not a JSON object.",
            where=str(folder / "manifest.json"),
            hint="Run 'delible unlearn' or 'delible audit' again.",
        )
    events_path, audit_path = folder / "events.jsonl", folder / "metrics.json"
    events: list[dict[str, Any]] = []
    notes = []
    if events_path.exists():
        resumed = manifest.get("resumed")
        events, broken = read_events(events_path, len(resumed) if isinstance(resumed, list) else 0)
        if broken:
            notes.append(
                f"The run was interrupted: {broken} half-written "
                f"{'line' if broken == 1 else 'lines'} of its log could not be read."
            )
    if manifest.get("stopped"):
        notes.append(f"The training was stopped early: {manifest['stopped']}")
    audit = None
    if audit_path.exists():
        hint = f"Run 'delible audit {folder}' again."
        try:
            audit = AuditResult.model_validate(_json(audit_path, hint))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise RunError(
                f"is not an audit result: '{key}': {first['msg']}.",
                where=str(audit_path),
                hint=hint,
            ) from None
    else:
        notes.append(f"This run has not been audited. Run 'delible audit {folder}'.")
    method, model = lookup(manifest, "method", "recipe"), lookup(manifest, "model")
    title = manifest.get("title")
    if not isinstance(title, str):
        title = " on ".join(part for part in (named(method), named(model)) if part) or folder.name
    story = manifest.get("story")
    if not isinstance(story, list):
        story = tell(named(method), named(model), events, audit)
    return ReportData(
        title=title,
        story=[str(sentence) for sentence in story],
        manifest=manifest,
        events=events,
        audit=audit,
        notes=notes,
    )


def read_runs(directories: Sequence[str | Path], title: str | None = None) -> ReportData:
    """One directory: its page. Several: one page that compares them.

    Raises:
        RunError: No directory given, or one that cannot be read.
    """
    if not directories:
        raise RunError("no run directory given.", hint="Give one or more: delible report DIR…")
    runs = [read_run(directory) for directory in directories]
    if len(runs) == 1:
        return runs[0] if title is None else runs[0].model_copy(update={"title": title})
    return ReportData(
        title=title or f"{len(runs)} runs compared",
        story=[f"{len(runs)} runs, side by side. Each run directory has a report of its own."],
        runs=runs,
    )


def tell(
    method: str | None,
    model: str | None,
    events: Sequence[dict[str, Any]],
    audit: AuditResult | None,
) -> list[str]:
    """What was done, in plain words, as far as the files say."""
    sentences = []
    if method or model:
        sentences.append(
            f"{model or 'A language model'} was asked to forget"
            + (f" with the method {method}." if method else ".")
        )
    steps = [event["step"] for event in events if charts.finite(event.get("step"))]
    if steps:
        sentences.append(f"Training took {max(steps):,} steps.")
    if audit is not None:
        asked = ", ".join(f"{count:,} {split}" for split, count in audit.splits.items())
        attacks = sum(leak.attack != "none" for leak in audit.leaks)
        sentences.append(
            f"The audit compared {_and([role for role in ROLES if role in audit.systems])} on "
            f"these records: {asked or 'none'}."
        )
        if attacks:
            sentences.append(
                f"It then tried to bring the knowledge back in {attacks} "
                f"{'way' if attacks == 1 else 'ways'}."
            )
    return sentences


# --- small helpers -------------------------------------------------------------------------


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def lookup(manifest: dict[str, Any], *keys: str) -> Any:
    """The first of the keys found at the top, in ``run`` or in ``config``; else ``None``."""
    places = [manifest, *(manifest.get(name) for name in ("run", "config"))]
    for place in places:
        if isinstance(place, dict):
            for key in keys:
                if place.get(key) is not None:
                    return place[key]
    return None


def named(value: Any) -> str | None:
    """The name of a method or model that is written as a name or as ``{"name": …}``."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("id")
    return value if isinstance(value, str) and value else None


def pretty(name: str, capital: bool = True) -> str:
    """``answer_probability`` -> ``Answer probability``; abbreviations of the field keep theirs."""
    words = name.replace("_", " ").replace("rouge l", "ROUGE-L").replace("rouge", "ROUGE")
    return words[:1].upper() + words[1:] if capital else words


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading: three decimals, or powers of ten where that would hide it."""
    if value is None or not charts.finite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 10.0**-digits:
        mantissa, exponent = f"{value:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa} × 10{raised}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.{digits}f}"


def shown(value: float | None, reason: str | None = None, digits: int = 3) -> Markup:
    """A number, or a dash whose tooltip says why there is none."""
    if value is not None and charts.finite(value):
        return Markup(escape(number(value, digits)))
    reason = reason or (NO_RECORD if value is None else f"the value is {value}")
    return Markup('<span class="none" title="{}">–<span class="hidden"> ({})</span></span>').format(
        reason, reason
    )


def score(value: float | None, reason: str | None = None) -> Markup:
    """A knowledge score for a narrow cell: two decimals, ``<0.01`` where that would be 0.00."""
    if value is not None and 0 < value < 0.005:
        return Markup('<span title="{}">&lt;0.01</span>').format(number(value))
    return shown(value, reason, 2)


def elapsed(seconds: float | None) -> Markup:
    """A duration, or a dash whose tooltip says why there is none."""
    if seconds is None or not charts.finite(seconds):
        return shown(None, "no time was recorded")
    return Markup(escape(duration(seconds)))


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter."""
    if seconds is None or not charts.finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


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
        (erased, f"{leak.title} ({leak.variant})" if leak.variant else leak.title, measure)
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
                reason = leak.note or "e needs the original's score to lie above the reference's"
            cells.append(
                {
                    "erased": erased,
                    "step": _step(erased),
                    "known": known,
                    "reason": reason,
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
        rows.append({"leak": leak, "cells": cells, "retain": retain})
    retained = next(
        (name for name in measures if any(name in leak.retain for leak in audit.leaks)), None
    )
    return {"measures": measures, "rows": rows, "retained": retained, "roles": _roles(audit)}


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


def _script_hash(text: str) -> str:
    """The source expression that lets a content security policy run exactly this script."""
    digest = hashlib.sha256(str(text).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    """Made once, because compiling the template takes longer than filling it in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        pretty=pretty,
        number=number,
        shown=shown,
        score=score,
        elapsed=elapsed,
        duration=duration,
        script_hash=_script_hash,
    )
    return environment


def render(data: ReportData) -> str:
    """The page as HTML text. Everything from ``data`` is escaped; the same data, the same text."""
    audit, manifest = data.audit, data.manifest
    command = manifest.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    template = _environment().get_template("template.html.j2")
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
        style=Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8")),
    )


def write(data: ReportData, path: str | Path) -> Path:
    """Renders and writes the page; a reader never sees a half-written file.

    Raises:
        RunError: The file cannot be written.
    """
    target, text = Path(path), render(data)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"the report cannot be written ({error.strerror}).",
            where=str(target),
            hint="Choose a directory that exists and can be written to.",
        ) from None
    return target
