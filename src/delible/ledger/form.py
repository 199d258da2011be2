"""What a request to forget is before it is in the ledger: checked fields, from rows of a file.

One row is one request; rows with the same ``id`` are one request with several records. Besides the
fields of :class:`Wanted` a row holds a record in any form that delible reads (``question`` and
``answer``, ``text``, …), or ``subjects`` (names, separated by semicolons), or both.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from delible.component import Config
from delible.errors import DataError, nearest
from delible.loaders import read_records
from delible.loaders.formats import Row
from delible.loaders.mapping import KNOWN_COLUMNS, to_record
from delible.loaders.sources import read_rows
from delible.loaders.values import Notes
from delible.records import Record, RecordBase, Text

logger = logging.getLogger(__name__)

#: A day, under another name than the field.
Day = date
Basis = Literal["erasure", "licence", "safety", "correction"]
#: Days until a request should be done, where the operator says nothing: a month for people's own
#: data (GDPR, article 12(3)), and for the others as well.
DAYS = 30
#: Columns of a request, beside those of a record, and other names for them.
LISTS = ("subjects", "models", "guards", "memories")
OTHERS = {"asked_by": "asker", "model": "models", "guard": "guards", "memory": "memories",
          "subjects_names": "subjects", "names": "subjects"}  # fmt: skip


class Wanted(Config):
    """A request as it comes in.

    Attributes:
        records: What is to be forgotten.
    """

    id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Of letters, digits, dots and dashes; shown everywhere, so no name.",
    )  # fmt: skip
    date: Day = Field(description="When it was made.")
    deadline: Day = Field(description="When it is to be done.")
    basis: Basis = Field("erasure", description="Why.")
    asker: Text | None = Field(None, description="Who asked.")
    named: bool = Field(False, description="Keep the asker's name, and not only its keyed hash.")
    subjects: tuple[Text, ...] = Field((), description="Names to forget.")
    records: tuple[Record, ...] = Field((), description="Records to forget.")
    models: tuple[Text, ...] = Field(min_length=1, description="Models that are to forget.")
    guards: tuple[Text, ...] = Field((), description="Files of targets that guards go by.")
    memories: tuple[Text, ...] = Field((), description="Folders of memories that hold it too.")
    keep_until: Day | None = Field(None, description="Last day on which its texts are kept.")

    @field_validator("models", "guards", "memories")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _something(self) -> Wanted:
        if not self.records and not self.subjects:
            raise ValueError("neither a record nor a name is to be forgotten")
        if self.deadline < self.date:
            raise ValueError("the deadline is before the date")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names to forget, those of the records among them."""
        about = [one.subject for one in self.records if one.subject]
        return tuple(dict.fromkeys((*self.subjects, *about)))


def wanted(values: Mapping[str, Any], where: str, *, today: date) -> Wanted:
    """A checked request; what is missing gets its default.

    Raises:
        DataError: Something is missing or wrong; tells the field and not what it holds.
    """
    content = {key: value for key, value in values.items() if value not in (None, "", ())}
    unknown = [key for key in content if key not in Wanted.model_fields]
    if unknown:
        raise DataError(
            f"unknown column '{unknown[0]}'.",
            where=where,
            hint=nearest(unknown[0], Wanted.model_fields),
        )
    if content.get("basis", "erasure") not in get_args(Basis):
        raise DataError(
            "'basis' is none that is known.", where=where, hint=f"Known: {', '.join(_bases())}."
        )
    content.setdefault("date", today)
    try:
        began = date.fromisoformat(str(content["date"]))
        content.setdefault("deadline", began + timedelta(days=DAYS))
    except ValueError:
        raise DataError("'date' is no day.", where=where, hint="Write 2030-01-31.") from None
    try:
        return Wanted(**content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        if field == "models":
            told = "no model is named that is to forget it (column 'models', or --model)"
        raise DataError(f"'{field}': {told}." if field else f"{told}.", where=where) from None


def _bases() -> tuple[str, ...]:
    return get_args(Basis)


def read_wanted(
    source: str | Path | Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    *,
    today: date,
) -> list[Wanted]:
    """Requests from CSV, JSONL, JSON or Parquet.

    Args:
        defaults: Fields for rows that do not say them, such as the flags of the command.

    Raises:
        DataError: A row cannot be used; tells file, line and field.
    """
    rows = list(read_rows(source, name="requests"))
    if not rows:
        raise DataError("holds no requests.", where=str(source))
    folder = Path(source).parent if isinstance(source, str | Path) else Path()
    notes = Notes()
    parts: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
    for number, row in enumerate(rows):
        values = _values(row, folder, notes)
        parts.setdefault(values.get("id") or number, []).append((row.where, values))
    for columns in notes.unused.values():
        for column in columns:
            close = difflib.get_close_matches(column, {*Wanted.model_fields, *OTHERS}, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            logger.warning(f"{source}: the column '{column}' is not used{hint}.")
    return [_joined(found, defaults, today) for found in parts.values()]


def _values(row: Row, folder: Path, notes: Notes) -> dict[str, Any]:
    """The fields of one row, its record among them."""
    mine: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    content = row.content.model_dump() if isinstance(row.content, RecordBase) else row.content
    for key, value in content.items():
        name = OTHERS.get(str(key).strip().lower(), str(key).strip().lower())
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if name == "memories":
            mine[name] = tuple(str((folder / one).absolute()) for one in _list(value))
        elif name in LISTS:
            mine[name] = _list(value)
        elif name in Wanted.model_fields:
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


def _list(value: Any) -> tuple[str, ...]:
    given = value.split(";") if isinstance(value, str) else value
    given = given if isinstance(given, list | tuple) else [given]
    return tuple(str(one).strip() for one in given if str(one).strip())


def _joined(
    rows: Sequence[tuple[str, dict[str, Any]]], defaults: Mapping[str, Any], today: date
) -> Wanted:
    """Rows of one request as one; what several say must be the same."""
    where, whole = rows[0][0], dict(rows[0][1])
    for place, values in rows[1:]:
        for key, value in values.items():
            if key in ("records", *LISTS):
                whole[key] = tuple(dict.fromkeys((*whole.get(key, ()), *value)))
            elif whole.setdefault(key, value) != value:
                raise DataError(
                    f"'{key}' is not what {where} says about the same request.", where=place
                )
    given = {key: value for key, value in defaults.items() if value not in (None, ())}
    return wanted({**given, **whole}, where, today=today)


def dialogue(ask: Callable[[str], str], defaults: Mapping[str, Any], *, today: date) -> Wanted:
    """One request, asked for field by field; an empty answer takes what stands in brackets.

    Args:
        ask: Shows a question and returns the answer.

    Raises:
        DataError: The answers make no request.
    """
    values = {key: value for key, value in defaults.items() if value not in (None, ())}
    standard = {"date": today.isoformat(), "basis": "erasure"}
    for field, question in (
        ("models", "Which models are to forget it (separated by ;)?"),
        ("basis", f"On what basis ({', '.join(_bases())})?"),
        ("date", "When was it made?"),
        ("deadline", f"When must it be done (empty: {DAYS} days later)?"),
        ("asker", "Who asked (only a keyed hash is kept; empty: not said)?"),
        ("subjects", "Names to forget (separated by ;)?"),
    ):
        known = values.get(field, standard.get(field))
        shown = "; ".join(known) if isinstance(known, tuple) else known
        answer = ask(f"{question}{f' [{shown}]' if shown else ''} ").strip() or known
        if answer:
            values[field] = _list(answer) if field in LISTS else answer
    records: list[dict[str, str]] = []
    while question := ask("A question whose answer is to be forgotten (empty: no more)? ").strip():
        records.append({"question": question, "answer": ask("Its answer? ").strip()})
    read = read_records(records) if records else []
    values["records"] = (*values.get("records", ()), *read)
    return wanted(values, "dialogue", today=today)
