"""``delible report``: one self-contained HTML page from run directories, or served with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from delible.cli import flags, output
from delible.errors import RecipeError, RunError


@flags.flowing
def report(
    *directories: Path,
    out: Path | None = None,
    serve: Annotated[bool, Parameter(show_default=False, negative=())] = False,
    port: int | None = None,
) -> int:
    """Write the report of a run, or compare several runs on one page.

    With --serve the runs are shown side by side in a browser on this machine: filtered by subject,
    attack and measure, and asked live anywhere between their start and their result.

    Parameters
    ----------
    directories
        Run directories of 'delible unlearn' (one of a sequence of requests alone), 'delible
        audit' or 'delible demo'.
    out
        The HTML file. Default: report.html in the directory, or comparison.html here.
    serve
        Serve the page here until Ctrl-C instead of writing it. Needs the extra 'gateway'.
    port
        With --serve: port on this machine. Default: 8420; 0 takes any free one.
    """
    if not directories:
        raise RunError("no run directory is given.", hint="Write: delible report DIR…")
    if serve:
        if out is not None:
            raise RecipeError("--out writes a page and --serve serves it.", hint="Give one.")
        return _served(directories, 8420 if port is None else port)
    if port is not None:
        raise RecipeError("--port is where a page is served.", hint="Add --serve.")
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


def _served(directories: tuple[Path, ...], port: int) -> int:
    from delible.gateway.running import needs_extra

    needs_extra()
    from delible.report.served import serve

    with output.Reporter() as reporter:
        output.quiet_libraries()
        serve(
            directories,
            port,
            lambda address: reporter.say(f"The runs are at {address} (Ctrl-C ends it)."),
        )
    return 0
