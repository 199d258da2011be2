"""``delible report``: a run and its audit, or several runs, as one self-contained HTML page.

The page needs no network, no fonts and no other file, and reads well without JavaScript. The
prose is in ``template.html.j2``, the looks in ``style.css``, the drawing in ``charts/``; this
file puts together what they show. The same data give the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delible.audit.result import Example, SystemRole
from delible.report import charts, html
from delible.report.html import environment
from delible.report.key import cost_lines, key_numbers
from delible.report.matrix import matrix, recovered, roles
from delible.report.pictures import (
    OUTCOMES,
    curves,
    forget_utility,
    layers,
    outcomes,
    training,
    whole_systems,
)
from delible.report.reading import ROLES, ReportData, lookup, named

EXAMPLES_SHOWN = 8


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


def comparison_of(runs: Sequence[ReportData]) -> dict[str, Any]:
    """A table of runs, and a picture of where they stand if there are several."""
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
    titles = {leak.attack: leak.title for leak in audit.leaks} if audit else {}
    template = environment().get_template("template.html.j2")
    return template.render(
        data=data,
        audit=audit,
        verdict=audit.verdict if audit else None,
        numbers=key_numbers(data),
        cost=cost_lines(manifest),
        comparison=comparison_of(data.runs) if data.runs else None,
        trade=forget_utility(audit) if audit else None,
        outcomes=outcomes(audit) if audit else [],
        classes=OUTCOMES,
        matrix=matrix(audit) if audit else None,
        recovered=recovered(audit) if audit else [],
        curves=curves(audit.curves, titles) if audit else [],
        layers=layers(audit.curves, titles) if audit else [],
        whole_systems=whole_systems(audit.leaks) if audit else [],
        training=training(data.events),
        examples=_examples(data),
        roles=roles(audit) if audit else [],
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
