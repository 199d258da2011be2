"""``delible request``: the ledger; entering requests, listing, showing, taking back."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from delible.cli import flags, output
from delible.cli.options import names_in
from delible.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delible.ledger import Ledger
    from delible.ledger.form import Wanted
    from delible.ledger.private import Erased
    from delible.ledger.requests import Request

Place = Annotated[Path | None, Parameter(name="--ledger", group=flags.RUN)]
Show = Annotated[bool, Parameter(name="--show", group=flags.RUN, show_default=False)]
Models = Annotated[list[str] | None, Parameter(name="--model", group=flags.DATA)]
Only = Annotated[str | None, Parameter(group=flags.DATA)]


def ledger_at(place: Path | None, reporter: output.Reporter, *, create: bool = False) -> Ledger:
    """The ledger of a flag; texts whose time is over go first, and that is said."""
    from delible.ledger import Ledger, default_place
    from delible.ledger.private import expire

    opened = Ledger(place or default_place(), create=create)
    for erased in expire(opened, date.today()):
        reporter.say(f"The time of request {erased.request} is over: its texts are gone.")
        told(reporter, erased)
    return opened


@flags.flowing
def add(
    file: str | None = None,
    /,
    *,
    model: Models = None,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    basis: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    asked_by: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    keep_name: Annotated[bool, Parameter(group=flags.DATA, show_default=False)] = False,
    day: Annotated[str | None, Parameter(name="--date", group=flags.DATA)] = None,
    deadline: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    keep_until: Annotated[str | None, Parameter(group=flags.DATA)] = None,
    guard_file: Annotated[list[str] | None, Parameter(group=flags.DATA)] = None,
    memory: Annotated[list[str] | None, Parameter(group=flags.DATA)] = None,
    name: Annotated[str | None, Parameter(name="--id", group=flags.DATA)] = None,
    ledger: Place = None,
) -> int:
    """Enter requests to forget: from a file, from flags, or one in a dialogue.

    A file has one request per row (CSV, JSONL, JSON or Parquet): id, date, deadline, basis, asker,
    models, subjects (separated by semicolons), and the columns of a record such as question and
    answer. Rows with the same id are one request. What a row does not say, the flags do. All rows
    are entered, or none. Without a file and without --forget and --subjects you are asked.

    Parameters
    ----------
    file
        The requests; '-' reads JSONL from standard input.
    model
        The models that are to forget, as 'delible request apply' will be given them.
    forget
        Records to forget, all of one request.
    subjects
        Names to forget, separated by commas, all of one request.
    basis
        erasure, licence, safety or correction. Default: erasure.
    asked_by
        Who asked. Only a keyed hash is kept, by which the same person is known again.
    keep_name
        Keep that name as well, until the request's texts go.
    day
        When the request was made, such as 2030-01-31. Default: today.
    deadline
        When it must be done. Default: 30 days later.
    keep_until
        The last day on which its texts are kept; after it they are erased, and the hashes stay.
    guard_file
        Files of targets in which it is to stand, instead of the policy's.
    memory
        Folders of memories that hold it too; 'apply' deletes it there with all that was made
        from it.
    name
        Its id (no name of a person: it is shown everywhere). Default: r-0001 and so on.
    ledger
        The file of the ledger. Default: DELIBLE_LEDGER, or one in your user's data folder.
    """
    given: dict[str, Any] = {
        "id": name, "models": tuple(model or ()), "basis": basis, "asker": asked_by,
        "date": day, "deadline": deadline, "keep_until": keep_until,
        "guards": tuple(guard_file or ()),
        "memories": tuple(str(Path(one).expanduser().absolute()) for one in memory or ()),
        "named": keep_name or None,
    }  # fmt: skip
    with output.Reporter() as reporter:
        from delible.ledger.requests import add as enter

        found = _entered(file, forget, subjects, given)
        opened = ledger_at(ledger, reporter, create=True)
        new, shared = enter(opened, found)
        for one in new:
            reporter.say(
                f"Request {one.id}: {one.basis}, due {one.deadline}, "
                f"{one.size} to forget at {', '.join(one.models)}."
            )
        for overlap in shared:
            reporter.say(f"{overlap}.")
        reporter.say(f"The ledger lies in {opened.path}.")
        reporter.say(f"Next: delible request apply {new[0].models[0]}")
        return 0


def _entered(
    file: str | None, forget: str | None, subjects: Sequence[str] | None, given: dict[str, Any]
) -> list[Wanted]:
    """The requests of a file, of flags, or of a dialogue."""
    from delible.ledger.form import dialogue, read_wanted, wanted

    today = date.today()
    if file is not None:
        if forget or subjects:
            raise DataError("a file of requests and flags of one are given.", hint="Give one.")
        return read_wanted(file, given, today=today)
    if forget or subjects:
        from delible.loaders import build_request

        request = build_request(forget=forget, subjects=names_in(subjects))
        texts = {"records": request.forget, "subjects": request.subjects}
        return [wanted({**given, **texts}, "request", today=today)]
    if sys.stdin.isatty():
        return [dialogue(input, given, today=today)]
    raise DataError(
        "there is no request.", hint="Give a FILE, --forget or --subjects, or use a terminal."
    )


@flags.flowing
def list_(
    *, model: Only = None, state: Only = None, as_json: flags.Json = False, ledger: Place = None
) -> int:
    """List the requests by deadline, with how far each is.

    Parameters
    ----------
    model
        Only those about this model.
    state
        Only those that are open, guarded, applied, failed, held or withdrawn.
    as_json
        Print them as JSON.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter(error=as_json)
    opened = ledger_at(ledger, reporter)
    from delible.ledger.requests import requests_of

    today = date.today()
    found = [
        (one, name, progress)
        for one in requests_of(opened.events()).values()
        for name, progress in one.progress.items()
        if model in (None, name) and state in (None, progress.state)
    ]
    found.sort(key=lambda row: (row[0].deadline, row[0].asked.sequence))
    if as_json:
        import json

        rows = [
            {
                "id": one.id, "model": name, "basis": one.basis, "date": str(one.date),
                "deadline": str(one.deadline), "days_left": one.days_left(today),
                "state": progress.state, "leaks": progress.leaks, "size": one.size,
                "guards": list(progress.guards), "erased": one.erased,
                "memories": {place: memory.word for place, memory in one.remembered.items()},
            }
            for one, name, progress in found
        ]  # fmt: skip
        print(json.dumps(rows, indent=2))
        return 0
    if found:
        columns = ("id", "deadline", "", "basis", "size", "model", "state")
        cells = [
            (one.id, str(one.deadline), one.urgency(today), one.basis, str(one.size), name,
             progress.word + (", behind a guard" if progress.guards and progress.applied else "")
             + (", memories left" if one.memories_left else ""))
            for one, name, progress in found
        ]  # fmt: skip
        reporter.console.print(output.table(columns, cells))
    late = {one.id for one, *_ in found if one.open and one.days_left(today) < 0}
    soon = {one.id for one, *_ in found if one.urgency(today)} - late
    if late:
        reporter.say(f"Past their deadline: {', '.join(sorted(late))}.")
    if soon:
        reporter.say(f"Due within a week: {', '.join(sorted(soon))}.")
    reporter.say(f"{opened.path}: {output.plural(len({one.id for one, *_ in found}), 'request')}.")
    return 0


@flags.flowing
def show(name: str, /, *, show: Show = False, ledger: Place = None) -> int:
    """Show a request and its history; what is to be forgotten only with --show.

    Parameters
    ----------
    name
        The id of the request.
    show
        Print the names and records, too, and who asked where that is kept.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    opened = ledger_at(ledger, reporter)
    from delible.ledger.requests import named, requests_of, texts_of

    request = named(requests_of(opened.events()), name)
    _fields(reporter, request)
    if show:
        texts = texts_of(opened.texts(name).get(name, {}))
        if texts is None:
            reporter.say("Its texts are gone.")
        else:
            if texts.asker:
                reporter.field("asked by", texts.asker)
            for subject in texts.subjects:
                reporter.field("name", subject)
            for record in texts.records:
                reporter.field("record", _words(record))
    cells = [
        (str(one.sequence), one.time, one.kind, one.model or "", _about(one.body))
        for one in request.history
    ]
    reporter.console.print(output.table(("event", "time", "what", "model", ""), cells))
    return 0


def _fields(reporter: output.Reporter, request: Request) -> None:
    from delible.ledger.memories import in_words

    left = request.urgency(date.today())
    reporter.field("request", request.id)
    reporter.field("basis", request.basis)
    reporter.field("made", str(request.date))
    reporter.field("deadline", f"{request.deadline}{f' ({left})' if left else ''}")
    reporter.field("to forget", f"{output.plural(request.size, 'record')} or names")
    if request.asker:
        reporter.field("asked by", f"keyed hash {request.asker[:16]}…")
    if request.guards:
        reporter.field("guards", ", ".join(request.guards))
    for place, memory in request.remembered.items():
        reporter.field("memory", f"{place}: {memory.word}")
        if memory.forgot is not None:
            reporter.say(f"  {in_words(memory.forgot.body).partition(': ')[2]}.")
            for sentence in memory.forgot.body["not_shown"]:
                reporter.say(f"  Not shown: {sentence}")
    if request.keep_until:
        reporter.field("kept until", str(request.keep_until))
    if request.erased:
        reporter.field("texts", f"gone ({request.erased})")
    for model, progress in request.progress.items():
        reporter.field(model, progress.word)


def _words(record: Any) -> str:
    from delible.records import to_json_line

    return to_json_line(record)


def _about(body: Any) -> str:
    """What an event says beside its kind, in short."""
    if "memory" in body:
        removed = sum(body.get("removed", {}).values())
        gone = f"{output.plural(removed, 'item')} removed" if "removed" in body else ""
        told = (body["memory"], gone, *map(body.get, ("verdict", "outcome", "error")))
        return ", ".join(one for one in told if one)
    names = ("run", "method", "targets", "reason", "error", "outcome", "system", "same_as")
    return ", ".join(f"{name} {body[name]}" for name in names if body.get(name))


@flags.flowing
def withdraw(
    name: str,
    /,
    *,
    reason: Annotated[str, Parameter(group=flags.DATA)] = "asked",
    ledger: Place = None,
) -> int:
    """Take a request back and erase its texts; the hashes stay.

    The texts go from the ledger's file, its journal, its runs and the files of targets; that they
    are gone is looked for, byte by byte. What was carried out stays as it is.

    Parameters
    ----------
    name
        The id of the request.
    reason
        A word for the history, such as 'asked' or 'done'; it is kept.
    ledger
        The file of the ledger.
    """
    reporter = output.Reporter()
    opened = ledger_at(ledger, reporter)
    from delible.ledger.private import withdraw as take_back
    from delible.ledger.requests import named, requests_of

    request = named(requests_of(opened.events()), name)
    if request.withdrawn:
        raise DataError(f"request {name} was withdrawn already.")
    erased = take_back(opened, name, request, reason)
    reporter.say(f"Request {name} is withdrawn.")
    told(reporter, erased)
    return 0


def told(reporter: output.Reporter, erased: Erased) -> None:
    """What was erased, and what could not be."""
    if erased.texts:
        reporter.say(
            f"{output.plural(erased.texts, 'text')} erased: {erased.looked_for} pieces of them "
            "were found as bytes before"
            + (", and none after." if not erased.left else ", and some after.")
        )
    if not erased.looked_for and erased.texts:
        reporter.say("They are too short, or too common, to be looked for as bytes.")
    for path in erased.left:
        reporter.say(f"It still holds some of the text: {path}.")
    if erased.named:
        reporter.say(
            f"{output.plural(len(erased.named), 'event')} of the ledger hold some of it in a name "
            "that was given (an id, a model, a path, a reason), and events are never changed."
        )
    if erased.shared:
        reporter.say(f"Other requests hold some of it, too: {', '.join(erased.shared)}.")
    for path in erased.entries:
        reporter.say(f"Its entry in {path} is out: guards no longer look for it.")
    for path in erased.kept:
        reporter.say(f"Its entry is the last in {path} and stays: stop the guard, delete the file.")
    reporter.say("Answers kept by earlier audits: 'delible cache clear --collection answers'.")
