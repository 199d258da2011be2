"""The pictures of a run's page: data become charts with the words that stand beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delible.audit.result import AuditResult, Curve, Leak, SystemRole
from delible.report import charts
from delible.report.key import PROBABILITY, key_numbers
from delible.report.reading import ROLES, ReportData
from delible.report.words import finite, number, pretty

OUTCOMES = ("correct", "refusal", "wrong-but-fluent", "garbage")


def forget_utility(audit: AuditResult) -> dict[str, Any] | None:
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
                if x is None or y is None or not (finite(x) and finite(y)):
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
            if x is not None and y is not None and finite(x) and finite(y):
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


def outcomes(audit: AuditResult) -> list[dict[str, Any]]:
    """Per split one chart: what kind of answers each system gives."""
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


def curves(found: Sequence[Curve], titles: dict[str, str]) -> list[dict[str, Any]]:
    """How fast the knowledge comes back under each attack that trains."""
    steps = [curve for curve in found if curve.axis == "step"]
    return _panels(steps, titles, "curve", "Attack steps", None)


def layers(found: Sequence[Curve], titles: dict[str, str]) -> list[dict[str, Any]]:
    """In which layers the knowledge is, for each attack from the inside."""
    by_layer = [curve for curve in found if curve.axis == "layer"]
    return _panels(by_layer, titles, "layers", "Layer", "Knowledge")


def _panels(
    found: Sequence[Curve], titles: dict[str, str], begin: str, x_label: str, y_label: str | None
) -> list[dict[str, Any]]:
    """A chart for each curve, with a line for each system, and its numbers.

    Args:
        begin: Begins the charts' ids.
        y_label: Of the vertical axis; None: the metric's name.
    """
    panels = []
    for index, curve in enumerate(found):
        title = titles.get(curve.attack, pretty(curve.attack)) + (
            f", {curve.variant}" if curve.variant else ""
        )
        measure = y_label or pretty(curve.metric)
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
            identifier=f"{begin}-{index}",
            title=f"{title}: {measure}",
            description="; ".join(
                f"{line.label} from {number(line.ys[0])} to {number(line.ys[-1])}"
                for line in series
                if line.ys
            ),
            x_label=x_label,
            y_label=measure,
            from_zero=True,
        )
        if svg is not None:
            panels.append({"title": title, "svg": svg})
    return panels


def whole_systems(leaks: Sequence[Leak]) -> list[dict[str, Any]]:
    """What attacks found of whole systems: a row for each number, a value for each system."""
    return [
        {"attack": leak.name, "name": pretty(name), "values": by_role}
        for leak in leaks
        for name, by_role in leak.numbers.items()
    ]


def _steps(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps in order, counted on through the stages of a run.

    A resumed run repeats the steps after its last checkpoint: the later event counts.
    """
    stages: dict[Any, dict[float, dict[str, Any]]] = {}
    for event in events:
        if finite(event.get("step")):
            stages.setdefault(event.get("stage"), {})[event["step"]] = event
    found: list[dict[str, Any]] = []
    for by_step in stages.values():
        before = found[-1]["step"] if found else 0
        found += [{**by_step[step], "step": before + step} for step in sorted(by_step)]
    return found


def training(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The log of training, a chart for each number; ``None`` where nothing was logged."""
    panels, missing = [], 0
    steps = _steps(events)
    wanted = (
        ("forget_loss", "Forget loss", "forget"),
        ("keep_loss", "Keep loss", "keep"),
        ("learning_rate", "Learning rate", "plain"),
        ("tokens_per_second", "Tokens per second", "plain"),
    )
    for name, title, kind in wanted:
        rows = [event for event in steps if name in event]
        values = [float(r[name]) if finite(r[name]) else None for r in rows]
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
