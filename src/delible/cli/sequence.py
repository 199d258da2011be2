"""``delible unlearn --requests``: requests one after the other, and what becomes of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.cli import output, tables
from delible.errors import RecipeError

if TYPE_CHECKING:
    from delible.method import Method
    from delible.sequence.result import SequenceResult, Step


#: Columns of the table that fit a terminal; the page has all.
SHOWN = (
    "request", "what", "left after it", "left at the end", "all earlier, left", "retained, kept",
    "seconds", "peak GiB",
)  # fmt: skip


def refuse(given: Mapping[str, Any]) -> None:
    """Refuses flags that belong to a single request.

    Raises:
        RecipeError: One was given.
    """
    for flag, value in given.items():
        if value:
            raise RecipeError(
                f"--{flag.replace('_', '-')} is for a single request.",
                where="--requests",
                hint="What belongs to one request stands in its row or its folder.",
            )


def run(
    reporter: output.Reporter,
    model: str,
    requests: Path,
    plan: Mapping[str, Any],
    *,
    chosen: Method,
    retain: str | None,
    out: Path | None,
    **options: Any,
) -> int:
    """Carries out the requests and says what became of each."""
    from delible.loaders import read_records, read_requests
    from delible.report.sequence import write_sequence
    from delible.sequence.run import unlearn_sequence

    named = read_requests(requests)
    kept = [] if retain is None else read_records(retain)
    folder = out or _folder(chosen, model, [one.request.id for one in named], plan)
    reporter.field("model", model)
    reporter.field("requests", f"{len(named)} of {requests}")
    reporter.field("method", chosen.name)
    reporter.field("folder", str(folder))

    def done(step: Step) -> None:
        reporter.finish_bar()
        reporter.say(f"Request {step.id} ({step.number} of {len(named)}): {step.told}")

    result = unlearn_sequence(
        model, named, out=folder, retain=kept, done=done, progress=reporter.progress(),
        stage=reporter.stage, **plan, **options,
    )  # fmt: skip
    reporter.finish_bar()
    conclude(reporter, result, write_sequence(result))
    return 0


def conclude(reporter: output.Reporter, result: SequenceResult, page: Path) -> None:
    """The table, what it shows, and what to do next."""
    from delible.sequence.findings import findings

    found = findings(result)
    undone = [step.id for step in result.steps if step.what == "done"]
    shown = [{key: row[key] for key in SHOWN} for row in found.rows]
    if shown:
        columns = list(shown[0])
        cells = [[tables.cell(row[column]) for column in columns] for row in shown]
        reporter.console.print(output.table(columns, cells))
    for note in found.notes:
        reporter.say(note)
    reporter.say(f"The result after all of them: {result.state}")
    reporter.field("page", str(page))
    if undone:
        reporter.say("Next, see how deep the forgetting goes; or undo one request:")
        reporter.say(f"  delible audit {result.state}")
        reporter.say(f"  delible undo {result.folder} --only {undone[-1]}")


def _folder(chosen: Method, model: str, requests: Sequence[str], plan: Mapping[str, Any]) -> Path:
    """The same for the same command and data, so that a killed one is found again."""
    text = json.dumps([chosen.spec(), model, requests, plan["seed"]], sort_keys=True, default=str)
    known = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path("runs") / f"{chosen.name}-sequence-{known}"
