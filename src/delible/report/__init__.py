"""The report: one self-contained HTML page about a run and its audit."""

from __future__ import annotations

from delible.report.page import render, write
from delible.report.reading import ReportData, read_run, read_runs

__all__ = ["ReportData", "read_run", "read_runs", "render", "write"]
