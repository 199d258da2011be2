"""The numbers of one run that a reader wants first, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from delible.audit.result import AuditResult, Measurement, SystemRole
from delible.report.reading import ROLES, ReportData
from delible.report.words import finite, pretty

#: Metrics that can stand for "how probable is the right answer", best first.
PROBABILITY = ("answer_probability", "probability", "normalised_probability")


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
        if leak.attack != "none" and leak.weighs
        for measure, erased in leak.erased.items()
        if erased is not None and finite(erased)
    ]
    if attacked:
        found.weakest, title, measure = min(attacked)
        found.weakest_title = f"{title}, {pretty(measure, capital=False)}"
    return found


def _split(audit: AuditResult, start: str) -> str | None:
    """The split of that name, else the first whose name starts so (``forget10``)."""
    names = [*audit.splits, *(row.split for row in audit.measurements)]
    return next(
        (name for name in names if name == start),
        next((name for name in names if name.startswith(start)), None),
    )


def _training_seconds(manifest: dict[str, Any]) -> float | None:
    cost = manifest.get("cost")
    if isinstance(cost, dict):
        for key in ("seconds", "total_seconds", "training_seconds"):
            if finite(cost.get(key)):
                return float(cost[key])
    try:
        start = datetime.fromisoformat(str(manifest["started"]))
        return (datetime.fromisoformat(str(manifest["ended"])) - start).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None


def cost_lines(manifest: dict[str, Any]) -> list[str]:
    """Cost and hardware in words, whatever the manifest holds."""
    result = []
    cost, hardware = manifest.get("cost"), manifest.get("hardware")
    if isinstance(cost, dict):
        for key, value in cost.items():
            if finite(value) and value and not key.endswith("seconds"):
                text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
                result.append(f"{pretty(key, capital=False)}: {text}")
    if isinstance(hardware, str):
        result.append(hardware)
    elif isinstance(hardware, dict):
        machine = [str(hardware[key]) for key in ("accelerator", "machine") if hardware.get(key)]
        for key, word in (("processors", "processors"), ("memory_gib", "GiB memory")):
            if finite(hardware.get(key)):
                machine.append(f"{hardware[key]:g} {word}")
        result.append(", ".join(machine))
    return [line for line in result if line]
