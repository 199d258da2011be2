"""The report: one self-contained HTML page about a run and its audit."""

from __future__ import annotations

from pathlib import Path

from delible.report.page import render, write
from delible.report.reading import ReportData, read_run, read_runs

__all__ = ["PAGE", "ReportData", "read_run", "read_runs", "render", "write", "write_page"]

#: The page of a run, in its folder.
PAGE = "report.html"


def write_page(folder: Path) -> Path:
    """Writes the page of a run from what lies in its folder."""
    return write(read_run(folder), folder / PAGE)
