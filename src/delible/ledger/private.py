"""What must not be seen: forgotten texts in messages and logs, and after their time anywhere.

Erasing is checked and not believed: before it the texts are looked for as bytes in the ledger and
the files beside it, and must be found (else the search itself is blind); after it they must not.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from delible.errors import DelibleError
from delible.files import explain_disk, write_json
from delible.ledger.alone import BusyError, alone
from delible.ledger.chain import Event, canonical
from delible.ledger.guarding import drop_guard
from delible.ledger.requests import Request, Texts, requests_of, texts_of
from delible.ledger.store import Draft, Ledger
from delible.ledger.texts import PrivateText
from delible.names import fold
from delible.records import QA, Choice, Dialogue, Passage, RecordBase
from delible.rundir import RunDirectory

logger = logging.getLogger(__name__)

HIDDEN = "…"
#: Days without an event after which the clock is doubted.
JUMP = 366
#: Shorter texts are too common to be looked for.
SHORTEST = 4
#: A text is looked for in pieces of so many bytes: SQLite cuts long ones into pages.
PIECE = 24
#: In other files than the ledger, shorter pieces may stand there by chance.
RARE = 8
#: What a run keeps of the forgotten texts besides its artefact.
KEPT_TEXTS = ("data", "generated", "report.html", "metrics.json", "items.parquet")
#: Never searched: numbers, and large.
_WEIGHTS = (".safetensors", ".gguf")


# ---- messages and logs


def secrets_of(texts: Texts | None) -> list[str]:
    """Every word or sentence that tells something of a request, the longest first."""
    if texts is None:
        return []
    found = {*texts.subjects, *([texts.asker] if texts.asker else [])}
    for record in texts.records:
        found |= set(_said_by(record))
    return sorted((one for one in found if len(one) >= 2), key=len, reverse=True)


def _said_by(record: RecordBase) -> Iterator[str]:
    if record.subject:
        yield record.subject
    match record:
        case QA():
            yield from (record.question, record.answer, *record.aliases, *record.paraphrases)
            yield from (*record.paraphrased_answers, *record.perturbed)
        case Choice():
            yield from (record.question, *record.options)
        case Passage():
            yield record.text
        case Dialogue():
            yield from (message.text for message in record.messages)


def redacted(message: str, secrets: Sequence[str]) -> str:
    """A message without what is secret."""
    for one in secrets:
        message = re.sub(re.escape(one), HIDDEN, message, flags=re.IGNORECASE)
    return message


class _Discreet(logging.Filter):
    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("delible.generation") and record.levelno < logging.WARNING:
            return False  # rows that the model was asked for
        record.msg, record.args = redacted(record.getMessage(), self._secrets), None
        return True


@contextmanager
def discreet(secrets: Sequence[str], *, show: bool = False) -> Iterator[None]:
    """What is logged inside tells nothing secret; nor does an error that comes out.

    Args:
        show: The texts may be seen.
    """
    if show:
        yield
        return
    hush = _Discreet(secrets)
    handlers = [*logging.getLogger("delible").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(hush)
    try:
        yield
    except DelibleError as error:
        error.args = (redacted(str(error), secrets),)
        error.problem = redacted(error.problem, secrets)
        error.where = redacted(error.where, secrets) if error.where else None
        error.hint = redacted(error.hint, secrets) if error.hint else None
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(hush)


# ---- erasing


@dataclass(frozen=True)
class Erased:
    """What became of the texts of a request.

    Attributes:
        texts: How many there were.
        looked_for: Pieces of them that were found in the ledger before: the search can see them.
        left: Files in which some of it is still found, such as a guard that goes by it.
        shared: Other requests that hold some of it too.
        entries: Files of targets from which its entry went.
        kept: Files of targets whose last entry it is, so that it stayed.
        named: Events that hold some of it in a name that was given: of a request, a model, a file.
    """

    request: str
    texts: int
    looked_for: int
    left: tuple[Path, ...]
    shared: tuple[str, ...]
    entries: tuple[Path, ...] = ()
    kept: tuple[Path, ...] = ()
    named: tuple[int, ...] = ()


def withdraw(ledger: Ledger, name: str, request: Request, reason: str = "asked") -> Erased:
    """Takes a request back: its texts go, its hashes stay, and nothing more is done about it.

    Raises:
        RunError: Another process carries out requests at one of its models.
    """
    return _erase(ledger, request, Draft("withdrawn", name, body={"reason": reason}, erase=True))


def expire(ledger: Ledger, today: date) -> list[Erased]:
    """Erases the texts of requests whose time is over, but for those that are being worked on.

    Texts do not come back: a clock that jumped ahead, by more than :data:`JUMP` days since the last
    event, erases nothing.
    """
    events = ledger.events()
    due = [
        one
        for one in requests_of(events).values()
        if one.keep_until is not None and one.keep_until < today and one.erased is None
    ]
    if due and (days := _days_since(events[-1], today)) > JUMP:
        logger.warning(
            f"The clock says {today}, {days} days after the last event of the ledger: no text goes "
            "at the end of its term until something else is written to it."
        )
        return []
    erased = []
    for one in due:
        with suppress(BusyError):  # the next command does it
            draft = Draft("erased", one.id, body={"reason": "term"}, erase=True)
            erased.append(_erase(ledger, one, draft))
    return erased


def _days_since(event: Event, today: date) -> int:
    try:
        return (today - datetime.fromisoformat(event.time).date()).days
    except ValueError:  # nobody knows what the clock said then
        return 0


def _erase(ledger: Ledger, request: Request, draft: Draft) -> Erased:
    """Whoever carries out requests has their texts, and would write them again."""
    with ExitStack() as stack:
        for model in sorted(request.models):
            stack.enter_context(alone(ledger, model))
        return _erased(ledger, requests_of(ledger.events())[request.id], draft)


def _erased(ledger: Ledger, request: Request, draft: Draft) -> Erased:
    everyone = ledger.texts()
    mine = everyone.pop(request.id, {})
    pieces = _pieces(mine)
    shared = tuple(one for one, fields in everyone.items() if pieces & _pieces(fields))
    own = pieces - {piece for fields in everyone.values() for piece in _pieces(fields)}
    events = ledger.events()
    said = b"".join(canonical(event.as_json()) for event in events)
    secrets = secrets_of(texts_of(mine))
    own = {piece for piece in own if piece not in said}  # words such as "models"
    before = _found(_beside(ledger), own)
    # outside first: if this is killed, the texts are still there to do it again
    entries: list[Path] = []
    kept: list[Path] = []
    for path in sorted({path for one in request.progress.values() for path in one.entries}):
        (entries if drop_guard(ledger, request, path, draft.kind) else kept).append(Path(path))
    folders = [ledger.path.parent / event.body["run"] for event in request.history
               if event.kind == "started"]  # fmt: skip
    for folder in folders:
        _scrub(folder, secrets)
    ledger.append(draft)
    found = _found(_beside(ledger), own)
    rare = {piece for piece in pieces if len(piece) >= RARE and piece not in said}
    found |= _found([*kept, *_files(folders)], rare)
    return Erased(
        request.id, len(mine), len({piece for pieces in before.values() for piece in pieces}),
        tuple(found), shared, tuple(entries), tuple(kept), tuple(_naming(events, secrets)),
    )  # fmt: skip


def _naming(events: Sequence[Event], secrets: Sequence[str]) -> Iterator[int]:
    """Events in whose names a secret stands, in any spelling."""
    letters = {fold(one).letters for one in secrets}
    told = {one for one in letters if len(one) >= RARE}
    for event in events:
        given = [event.request, event.model, *_strings(event.body)]
        if any(one in fold(text).letters for text in given if text for one in told):
            yield event.sequence


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, Mapping):
        for value in content.values():
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)
    elif isinstance(content, str):
        yield content


def _scrub(folder: Path, secrets: Sequence[str]) -> None:
    """Takes the texts out of a run; the artefact and its hashes stay."""
    run = RunDirectory(folder)
    if not run.manifest_path.exists():
        return
    with explain_disk(folder):
        for name in KEPT_TEXTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        manifest = run.manifest
        manifest["examples"] = []
        manifest["notes"] = _without(manifest.get("notes"), secrets)
        if isinstance(manifest.get("run"), dict):
            manifest["run"]["subjects"] = []
        write_json(run.manifest_path, manifest)


def _without(content: Any, secrets: Sequence[str]) -> Any:
    """Plain data, keys as well, without what is secret."""
    if isinstance(content, Mapping):
        return {redacted(str(key), secrets): _without(one, secrets) for key, one in content.items()}
    if isinstance(content, list):
        return [_without(one, secrets) for one in content]
    return redacted(content, secrets) if isinstance(content, str) else content


def _beside(ledger: Ledger) -> list[Path]:
    """The ledger, and what SQLite may have left next to it."""
    found = sorted(ledger.path.parent.glob(f"{ledger.path.name}*"))
    return [path for path in found if path.is_file() and path != ledger.key_path]


def _files(folders: Iterable[Path]) -> list[Path]:
    return [
        path
        for folder in dict.fromkeys(folders)
        if folder.is_dir()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in _WEIGHTS
    ]


def _pieces(fields: Mapping[str, PrivateText]) -> set[bytes]:
    """What to look for: the words of texts as they would lie in a file, and not the field names."""
    found: set[bytes] = set()
    for text in secrets_of(texts_of(fields)):
        for form in {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}:
            data = form.encode()
            if len(data) >= SHORTEST:
                found |= {data[at : at + PIECE] for at in range(0, max(1, len(data) - 8), PIECE)}
    return {piece for piece in found if len(piece) >= SHORTEST}


def _found(paths: Iterable[Path], pieces: set[bytes]) -> dict[Path, set[bytes]]:
    """Which pieces lie in which files."""
    found = {}
    for path in dict.fromkeys(paths):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if here := {piece for piece in pieces if piece in data}:
            found[path] = here
    return found
