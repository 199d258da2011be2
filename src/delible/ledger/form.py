"""What a request to forget is before it is in the ledger: checked fields, from rows of a file.

One row is one request; rows with the same ``id`` are one request with several records. Besides the
fields of :class:`Wanted` a row holds a record in any form that delible reads (``question`` and
``answer``, ``text``, …), or ``subjects`` (names, separated by semicolons), or both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from delible.component import Config
from delible.errors import DataError, nearest
from delible.loaders import read_records
from delible.loaders.requests import RowForm, grouped, joined, listed
from delible.records import Record, Text

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


FORM = RowForm(Wanted.model_fields, LISTS, OTHERS, ("memories",))


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
    found = [joined(rows, LISTS) for rows in grouped(source, FORM)]
    given = {key: value for key, value in defaults.items() if value not in (None, ())}
    return [wanted({**given, **values}, where, today=today) for where, values in found]


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
            values[field] = listed(answer) if field in LISTS else answer
    records: list[dict[str, str]] = []
    while question := ask("A question whose answer is to be forgotten (empty: no more)? ").strip():
        records.append({"question": question, "answer": ask("Its answer? ").strip()})
    read = read_records(records) if records else []
    values["records"] = (*values.get("records", ()), *read)
    return wanted(values, "dialogue", today=today)
