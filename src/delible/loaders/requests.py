"""Several requests from one file or folder, and what two requests share.

One row of a file is one request; rows with the same ``id`` are one request with several records.
A row holds a record in any form that delible reads (``question`` and ``answer``, ``text``, …), or
``subjects`` (names, separated by semicolons), or ``records`` (a list of rows, or a file beside this
one), or several of these. In a folder every file is a request, named after the file; and every
folder in it with a file ``forget``, perhaps beside others called ``retain``, ``neighbours`` and
``holdout``.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from delible.errors import DataError
from delible.loaders.formats import Row
from delible.loaders.mapping import KNOWN_COLUMNS, read_records, to_record
from delible.loaders.request import build_request, fact
from delible.loaders.sources import READERS, read_rows
from delible.loaders.values import Notes
from delible.names import fold
from delible.records import ForgetRequest, Record, RecordBase

logger = logging.getLogger(__name__)

ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
#: Splits of a request, as files in its folder.
PARTS = ("forget", "retain", "neighbours", "holdout")
#: What the ledger's requests hold too, and a sequence has no use for.
OF_THE_LEDGER = (
    "date", "deadline", "basis", "asker", "named", "models", "guards", "memories", "keep_until",
)  # fmt: skip


@dataclass(frozen=True)
class RowForm:
    """Which columns of a row are the request's own; all others are a record's.

    Attributes:
        fields: The request's columns.
        lists: Those of them that hold several values.
        others: Other names of columns.
        folders: Lists of folders, read from the file's own.
    """

    fields: Collection[str]
    lists: Collection[str] = ("subjects",)
    others: Mapping[str, str] = field(default_factory=dict)
    folders: Collection[str] = ()


Values = tuple[str, dict[str, Any]]


def grouped(source: str | Path | Sequence[Mapping[str, Any]], form: RowForm) -> list[list[Values]]:
    """The rows of each request: where a row stands, and its values, ``records`` among them.

    Raises:
        DataError: There are none, or a row cannot be read; tells file and line.
    """
    rows = list(read_rows(source, name="requests"))
    if not rows:
        raise DataError("holds no requests.", where=str(source))
    folder = Path(source).parent if isinstance(source, str | Path) else Path()
    notes = Notes()
    parts: dict[Any, list[Values]] = {}
    for number, row in enumerate(rows):
        values = _values(row, folder, notes, form)
        parts.setdefault(values.get("id") or number, []).append((row.where, values))
    for columns in notes.unused.values():
        for column in columns:
            close = difflib.get_close_matches(column, {*form.fields, *form.others}, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            logger.warning(f"{source}: the column '{column}' is not used{hint}.")
    return list(parts.values())


def _values(row: Row, folder: Path, notes: Notes, form: RowForm) -> dict[str, Any]:
    """The fields of one row, its record among them."""
    mine: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    content = row.content.model_dump() if isinstance(row.content, RecordBase) else row.content
    for key, value in content.items():
        name = form.others.get(str(key).strip().lower(), str(key).strip().lower())
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if name in form.folders:
            mine[name] = tuple(str((folder / one).absolute()) for one in listed(value))
        elif name in form.lists:
            mine[name] = listed(value)
        elif name in form.fields:
            mine[name] = value.strip() if isinstance(value, str) else value
        else:
            rest[str(key)] = value
    if isinstance(mine.get("id"), int):
        mine["id"] = str(mine["id"])
    given = mine.pop("records", None)
    source = folder / given if isinstance(given, str) else given
    records = read_records(source) if source is not None else []
    if set(rest) == {"subject"}:
        mine["subjects"] = (*mine.get("subjects", ()), str(rest["subject"]))
    elif rest and (set(rest) & KNOWN_COLUMNS or not (records or mine.get("subjects"))):
        records.append(to_record(replace(row, content=rest), {}, notes))
    elif rest:
        notes.unused.setdefault("requests", list(rest))
    return {**mine, "records": tuple(records)}


def listed(value: Any) -> tuple[str, ...]:
    """A list, or a text with semicolons, as texts."""
    given = value.split(";") if isinstance(value, str) else value
    given = given if isinstance(given, list | tuple) else [given]
    return tuple(str(one).strip() for one in given if str(one).strip())


def joined(rows: Sequence[Values], lists: Collection[str] = ("subjects",)) -> Values:
    """Rows of one request as one; what several say must be the same.

    Raises:
        DataError: Two rows differ.
    """
    where, whole = rows[0][0], dict(rows[0][1])
    for place, values in rows[1:]:
        for key, value in values.items():
            if key in ("records", *lists):
                whole[key] = tuple(dict.fromkeys((*whole.get(key, ()), *value)))
            elif whole.setdefault(key, value) != value:
                raise DataError(
                    f"'{key}' is not what {where} says about the same request.", where=place
                )
    return where, whole


# ---- a sequence


@dataclass(frozen=True)
class Named:
    """A request of a sequence.

    Attributes:
        id: Shown everywhere, so no name of a person.
    """

    id: str
    request: ForgetRequest


_FORM = RowForm(
    fields=("id", "records", "subjects", *OF_THE_LEDGER),
    others={"names": "subjects", "forget": "records", "model": "models", "guard": "guards",
            "memory": "memories", "asked_by": "asker"},
)  # fmt: skip


def read_requests(source: str | Path) -> list[Named]:
    """The requests of a file or a folder, in order.

    The order is that of the file's rows, or that of the names in a folder (``2`` before ``10``).

    Raises:
        DataError: There are none, or one cannot be read; tells where.
    """
    path = Path(source).expanduser()
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    ids = [one.id for one in found]
    for one in ids:
        if not ID.match(one):
            raise DataError(
                f"'{one}' is no id of a request.",
                where=str(source),
                hint="Letters, digits, dots and dashes, 64 at most.",
            )
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise DataError(f"there are two requests '{twice[0]}'.", where=str(source))
    return found


def _of_file(path: Path) -> list[Named]:
    found = []
    for number, rows in enumerate(grouped(path, _FORM), start=1):
        where, values = joined(rows)
        if not values["records"] and not values.get("subjects"):
            raise DataError("neither a record nor a name is to be forgotten.", where=where)
        request = ForgetRequest(forget=values["records"], subjects=values.get("subjects", ()))
        found.append(Named(values.get("id", f"{number:03d}"), request))
    return found


def _of_folder(path: Path) -> list[Named]:
    found = []
    for one in sorted(path.iterdir(), key=_natural):
        if one.is_dir():
            parts = {part: _file_called(one, part) for part in PARTS}
            if parts["forget"] is not None:
                request = build_request(
                    forget=parts["forget"], retain=parts["retain"],
                    neighbours=parts["neighbours"], holdout=parts["holdout"],
                )  # fmt: skip
                found.append(Named(one.name, request))
        elif one.suffix in READERS and not one.name.startswith("."):
            found.append(Named(one.stem, build_request(forget=one)))
    if not found:
        raise DataError(
            "holds no requests.",
            where=str(path),
            hint="A file of records for each request, or a folder with a file 'forget'.",
        )
    return found


def _file_called(folder: Path, name: str) -> Path | None:
    known = [folder / f"{name}{ending}" for ending in READERS]
    return next((one for one in known if one.is_file()), None)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """``2`` before ``10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(one), "") if one.isdigit() else (1, 0, one) for one in parts]


# ---- what requests share


@dataclass(frozen=True)
class Holds:
    """What a request holds, up to white space and case.

    Attributes:
        facts: One text for each record.
        names: Of its subjects, and of those of its records.
        asked: Of its subjects alone. Who asks for a name asks for all about it: a record about
            that name is less.
    """

    facts: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, records: Iterable[Record], subjects: Iterable[str] = ()) -> Holds:
        """What records and names hold."""
        rows = tuple(records)
        facts = frozenset(json.dumps(fact(one)) for one in rows)
        asked = frozenset(_folded(name) for name in subjects)
        about = frozenset(_folded(one.subject) for one in rows if one.subject)
        return cls(facts, asked | about, asked)

    def covers(self, other: Holds) -> bool:
        """Whether all that another one holds is in this one."""
        return other.without(self) == Holds()

    def without(self, other: Holds) -> Holds:
        """What it holds and another one does not."""
        return Holds(
            self.facts - other.facts, self.names - other.names, self.asked - other.asked
        )  # fmt: skip

    def shares(self, other: Holds) -> bool:
        """Whether a fact, or a name, is in both."""
        return bool(self.facts & other.facts or self.names & other.names)

    def __or__(self, other: Holds) -> Holds:
        return Holds(
            self.facts | other.facts, self.names | other.names, self.asked | other.asked
        )  # fmt: skip


def _folded(name: str) -> str:
    """By its letters; a name without any, such as of signs, as it is."""
    return fold(name).letters or " ".join(name.split())


__all__ = [
    "Holds", "Named", "RowForm", "grouped", "joined", "listed", "read_requests",
]  # fmt: skip
