"""The report: one self-contained HTML page about a run and its audit."""

from __future__ import annotations

from delible.report.page import ReportData, read_run, read_runs, render, write

__all__ = ["ReportData", "read_run", "read_runs", "render", "write"]
