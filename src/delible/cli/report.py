"""``delible report``: one self-contained HTML page from run directories."""

from __future__ import annotations

from pathlib import Path

from delible.cli import flags, output
from delible.errors import RunError


@flags.flowing
def report(*directories: Path, out: Path | None = None) -> int:
    """Write the report of a run, or compare several runs on one page.

    Parameters
    ----------
    directories
        Run directories of 'delible unlearn' (one of a sequence of requests alone), 'delible
        audit' or 'delible demo'.
    out
        The HTML file. Default: report.html in the directory, or comparison.html here.
    """
    if not directories:
        raise RunError("no run directory is given.", hint="Write: delible report DIR…")
    from delible.report import read_runs, write
    from delible.report.sequence import write_sequence
    from delible.sequence.result import is_sequence, read_sequence

    if len(directories) == 1 and is_sequence(directories[0]):
        page = write_sequence(read_sequence(directories[0]), out)
        output.Reporter().say(f"The report: {page}")
        return 0
    path = out or (
        directories[0] / "report.html" if len(directories) == 1 else Path("comparison.html")
    )
    output.Reporter().say(f"The report: {write(read_runs(directories), path)}")
    return 0
