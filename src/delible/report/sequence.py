"""The page of a sequence of requests. The prose is in ``sequence.html.j2``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from delible.report import html
from delible.report.findings import table_of
from delible.report.origin import machine
from delible.report.panels import panels
from delible.rundir import RunDirectory
from delible.sequence.findings import findings
from delible.sequence.result import SequenceResult

#: Columns of the table with shares that are left, coloured.
SHADED = ("left after it", "left at the end", "most left since")


def write_sequence(result: SequenceResult, path: Path | None = None) -> Path:
    """Writes ``report.html`` into the folder of a sequence, or elsewhere.

    Raises:
        RunError: It cannot be written.
    """
    return html.write(render_sequence(result), path or result.folder / "report.html")


def render_sequence(result: SequenceResult) -> str:
    """The page as HTML text; the same data, the same text."""
    found = findings(result)
    manifest: dict[str, Any] = RunDirectory(result.folder).manifest
    return html.environment().get_template("sequence.html.j2").render(
        result=result,
        count=len(result.ids),
        notes=found.notes,
        panels=panels(found.charts),
        table=table_of(found.rows, SHADED),
        command=shlex.join(map(str, manifest.get("command", []))),
        versions=manifest.get("versions", {}),
        hardware=machine(manifest["hardware"]) if manifest.get("hardware") else "",
    )  # fmt: skip
