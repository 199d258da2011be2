"""The page of what an experiment found, and its numbers. The prose is in ``findings.html.j2``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delible.files import write_json
from delible.measure.benchmark import Experiment, Findings
from delible.report import html
from delible.report.matrix import step
from delible.report.origin import flags, machine, options_of
from delible.report.panels import panels
from delible.report.words import finite, text_of
from delible.rundir import git_revision, hardware, versions


def write_findings(
    folder: Path, experiment: Experiment, findings: Findings, described: Mapping[str, Any]
) -> Path:
    """Writes ``experiment.html`` and ``experiment.json`` into a folder that exists.

    Args:
        described: ``model`` and ``methods``, and where they are known ``seeds``, ``data`` and
            ``seconds``.

    Returns:
        The page.

    Raises:
        RunError: It cannot be written.
    """
    numbers = {
        **described, "command": _command(experiment, described), "rows": findings.rows,
        "runs": findings.runs, "notes": findings.notes, "versions": versions(),
        "hardware": hardware(), "git_revision": git_revision(),
    }  # fmt: skip
    write_json(folder / "experiment.json", numbers)
    text = render_findings(experiment, findings, described)
    return html.write(text, folder / "experiment.html")


def render_findings(
    experiment: Experiment, findings: Findings, described: Mapping[str, Any]
) -> str:
    """The page of an experiment as HTML text."""
    return html.environment().get_template("findings.html.j2").render(
        card=experiment.card,
        notes=findings.notes,
        panels=panels(findings.charts),
        table=table_of(findings.rows, findings.shaded),
        options=options_of(experiment),
        described=described,
        command=_command(experiment, described),
        versions=described.get("versions") or versions(),
        hardware=machine(described.get("hardware") or hardware()),
    )  # fmt: skip


def table_of(rows: Sequence[Mapping[str, Any]], shaded: Sequence[str]) -> dict[str, Any] | None:
    """Columns in the rows' order; numbers stand right and sort as numbers, shares are shaded."""
    if not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {
        column: all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            for value in (row.get(column) for row in rows)
        )
        for column in columns
    }
    return {
        "columns": [{"title": column, "number": numeric[column]} for column in columns],
        "rows": [
            [
                {
                    "text": text_of(value := row.get(column)),
                    "value": _sort_key(value),
                    "step": step(value) if column in shaded and finite(value) else None,
                }
                for column in columns
            ]
            for row in rows
        ],
    }


def _sort_key(value: Any) -> str:
    if value is None or (isinstance(value, float) and not finite(value)):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return text_of(value).lower()


def _command(experiment: Experiment, described: Mapping[str, Any]) -> str:
    words = ["delible", "bench", experiment.card.name]
    if described.get("methods"):
        words += ["--methods", ",".join(map(str, described["methods"]))]
    words += ["--model", str(described["model"]), *flags(experiment)]
    for attack in described.get("attacks") or ():
        words += ["--attacks", attack if isinstance(attack, str) else json.dumps(attack)]
    for part, player in (described.get("roles") or {}).items():
        words += ["--role", f"{part}={player if isinstance(player, str) else json.dumps(player)}"]
    for key in ("seeds", "data"):
        if described.get(key):
            words += [f"--{key}", str(described[key])]
    return shlex.join(words)
