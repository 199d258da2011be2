"""``delible targets``: the file by which guards go."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from delible.cli import flags, output
from delible.errors import DataError, RecipeError


@flags.flowing
def targets(
    action: Literal["make", "check"],
    file: Path | None = None,
    /,
    *,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    asked_by: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    until: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    out: Annotated[Path | None, Parameter(group=flags.RUN)] = None,
) -> int:
    """Make the file of targets that guards go by, or check one.

    make writes one target per subject, with the records about it; add aliases, a description or
    a last day by hand. Records that name no subject are told and left out: guards find targets by
    their names. check reads a file as a guard would, and tells what is wrong with it.

    Parameters
    ----------
    action
        make or check.
    file
        The file to check (.yaml or .jsonl).
    forget
        Records to forget.
    subjects
        Names to forget, separated by commas.
    asked_by
        Who asked for it, or the number of the request.
    until
        The last day on which the targets count, such as 2030-01-31.
    out
        The file to write; .jsonl has one target per line. Default: targets.yaml.
    """
    reporter = output.Reporter()
    from delible.systems.targets import Targets, read_targets, write_targets

    if action == "check":
        if file is None:
            raise RecipeError("no file is given.", hint="Write: delible targets check FILE")
        found = read_targets(file)
        counting = found.on(date.today())
        ended = len(found) - len(counting)
        past = f"; {ended} of them count no more" if ended else ""
        reporter.say(f"{file} holds {len(found)} targets{past}.")
        return 0
    if file is not None:
        raise RecipeError("make takes no file to read.", hint="Give --forget or --subjects.")
    path = out or Path("targets.yaml")
    if path.exists():
        raise DataError(
            "is there already, perhaps with targets added by hand.",
            where=str(path),
            hint="Name another file with --out, or delete this one.",
        )
    from delible.loaders import build_request

    names = [name for text in subjects or () for name in text.split(",") if name.strip()]
    request = build_request(forget=forget, subjects=names)
    made, nameless = _targets(request.subjects, request.forget, asked_by, until)
    if nameless:
        reporter.say(f"{nameless} records name no subject and are left out.")
    if not made:
        raise DataError(
            "no record names a subject.", where="--forget", hint="Add --subjects NAME,…"
        )
    write_targets(Targets(targets=tuple(made)), path)
    reporter.say(f"{path}: {len(made)} targets. A guard goes by it: --targets {path}.")
    return 0


def _targets(
    subjects: Iterable[str], records: Iterable[Any], asked_by: str | None, until: str | None
) -> tuple[list[Any], int]:
    """One target per subject, and how many records are about none."""
    from delible.systems.targets import Target

    by_name: dict[str, list[Any]] = {name: [] for name in subjects}
    nameless = 0
    for record in records:
        if record.subject:
            by_name.setdefault(record.subject, []).append(record)
        else:
            nameless += 1
    last = _day(until)
    made = [
        Target(
            id=f"target-{number}",
            names=(name,),
            records=tuple(about),
            asked_by=asked_by,
            until=last,
        )
        for number, (name, about) in enumerate(by_name.items(), start=1)
    ]
    return made, nameless


def _day(text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise RecipeError(
            f"'{text}' is no day.", where="--until", hint="Write 2030-01-31."
        ) from None
