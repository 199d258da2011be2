"""From rows to records: explicit forms, exact places, errors that say what to do."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delible.errors import DataError, nearest
from delible.loaders.checking import check_record, validated
from delible.loaders.formats import Row, describe
from delible.loaders.forms import FORMS, JSON_COLUMNS, Form, FormError
from delible.loaders.pictures import with_pictures
from delible.loaders.sources import Source, read_rows
from delible.loaders.values import (
    OPTIONS,
    TEXT_LISTS,
    Notes,
    as_text,
    has_number,
    is_missing,
    is_number,
    turns,
    with_texts,
)
from delible.records import QA, Choice, Dialogue, Passage, Record, RecordBase

logger = logging.getLogger(__name__)

MODELS: dict[str, type[RecordBase]] = {
    "qa": QA, "passage": Passage, "choice": Choice, "dialogue": Dialogue
}  # fmt: skip
KNOWN_COLUMNS = frozenset(
    column
    for form in FORMS
    for column in (*form.required.values(), *(column for _, column in form.optional))
) | {"type"}


@dataclass(frozen=True)
class Located:
    """A record and the place that it was read from (``"path:line"``, counted from 1)."""

    record: Record
    where: str


def read_records(source: Source, *, columns: Mapping[str, str] | None = None) -> list[Record]:
    """Reads records from a file, a data set or a list.

    Args:
        source: A path (.jsonl, .json, .csv, .tsv, .parquet, .txt; ``.gz`` behind each), ``"-"``
            (JSONL on standard input), ``"hf:owner/name[:config][:split]"``, a
            ``datasets.Dataset``, or a list of mappings and records.
        columns: Known column name -> the source's name for it, such as ``{"question": "q"}``.

    Raises:
        DataError: Something cannot be used; says where.
        MissingExtraError: The source needs an optional package.
    """
    return [found.record for found in read_located(source, columns=columns)]


def read_located(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    name: str = "records",
) -> list[Located]:
    """Like :func:`read_records`, and keeps each record's place.

    Args:
        name: What to call an in-memory source in messages.
    """
    columns = columns or {}
    label = str(source) if isinstance(source, str | Path) else name
    for column in columns:
        if column not in KNOWN_COLUMNS:
            raise DataError(
                f"unknown column '{column}' in columns (--column).",
                where=label,
                hint=nearest(column, KNOWN_COLUMNS),
            )
    notes = Notes()
    folder = _folder(source)
    found = [
        _located(with_pictures(row, folder), columns, notes) for row in read_rows(source, name=name)
    ]
    if not found and isinstance(source, str | Path):
        raise DataError("holds no records.", where=label)
    for title, ignored in notes.unused.items():
        listed = ", ".join(_with_suggestion(column) for column in ignored)
        logger.warning(f"{label}: read as '{title}'; columns not used: {listed}.")
    for sentence in notes.sentences():
        logger.warning(f"{label}: {sentence}")
    return found


def _folder(source: Source) -> Path | None:
    """The folder of a file, from which paths in it are meant."""
    if not isinstance(source, str | Path) or source == "-" or str(source).startswith("hf:"):
        return None
    return Path(source).expanduser().absolute().parent


def _located(row: Row, columns: Mapping[str, str], notes: Notes) -> Located:
    record = to_record(row, columns, notes)
    if record is not row.content:  # what the caller made is left as it is
        vars(record)["where"] = row.where
    return Located(record, row.where)


def _with_suggestion(column: str) -> str:
    known = {field for model in MODELS.values() for field in model.model_fields}
    close = difflib.get_close_matches(column, known - {"type", column}, n=1, cutoff=0.85)
    return f"'{column}' (did you mean '{close[0]}'?)" if close else f"'{column}'"


def to_record(row: Row, columns: Mapping[str, str], notes: Notes) -> Record:
    """One row as a record.

    Args:
        notes: What was not used or read otherwise; added to.

    Raises:
        DataError: The row fits no form, or its values are wrong.
    """
    if isinstance(row.content, RecordBase):
        check_record(row.content, row.where)
        return row.content  # type: ignore[return-value]
    values = _renamed(row, columns)
    if row.is_text:
        values = {name: _cell(name, value, row.where) for name, value in values.items()}
    if (model := _own_model(values, row.where)) is not None:
        filled = {name: value for name, value in values.items() if value is not None}
        if "messages" in filled:
            filled["messages"] = turns(filled["messages"], "messages", row.where, notes)
        filled = with_texts(filled, notes, columns)
        return validated(model, {**filled, "type": values["type"].strip()}, row.where, columns)
    form = _form_of(values, row.where)
    for name in values:
        taken = (*form.required.values(), *(column for _, column in form.optional))
        if name not in taken and name not in (known := notes.unused.setdefault(form.title, [])):
            known.append(name)
    sources = {field: columns.get(name, name) for field, name in form.required.items()}
    if form.model is Dialogue:
        column = form.required["messages"]
        values[column] = turns(values[column], sources["messages"], row.where, notes)
    try:
        fields = _fields(form, values, row.is_text, notes, sources)
    except FormError as error:
        raise DataError(error.problem, where=row.where, hint=error.hint) from None
    return validated(form.model, fields, row.where, sources)


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    content: Mapping[str, Any] = row.content  # type: ignore[assignment]
    values = {str(name): v for name, v in content.items() if name not in columns.values()}
    values = {name: None if is_missing(value) else value for name, value in values.items()}
    for column, theirs in columns.items():
        if theirs not in content:
            raise DataError(
                f"there is no column '{theirs}' (for '{column}').",
                where=row.where,
                hint=nearest(theirs, map(str, content)),
            )
        values[column] = None if is_missing(content[theirs]) else content[theirs]
    return values


def _cell(name: str, value: Any, where: str) -> Any:
    if not isinstance(value, str) or name not in JSON_COLUMNS:
        return value
    if not value.lstrip().startswith(("[", "{")):
        return [value] if name in TEXT_LISTS else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the cell '{name}' is not valid JSON ({error}).",
            where=where,
            hint='A list in a CSV cell is written as JSON: ["first", "second"].',
        ) from None


def _own_model(values: Mapping[str, Any], where: str) -> type[RecordBase] | None:
    """The model that the row names in ``type``; other sets use that column for other things."""
    given = values.get("type")
    if not isinstance(given, str):
        return None
    if (model := MODELS.get(given.strip())) is not None:
        return model
    own = {field for model in MODELS.values() for field in model.model_fields}
    if values.keys() <= own and difflib.get_close_matches(given.lower(), MODELS, cutoff=0.6):
        raise DataError(
            f"unknown record type '{given}'.", where=where, hint=nearest(given.lower(), MODELS)
        )
    return None


def _form_of(values: Mapping[str, Any], where: str) -> Form:
    filled = {name for name, value in values.items() if value is not None}
    # Columns of a table exist in every row; those that are filled say what the row is.
    for present in (filled, set(values)):
        for form in FORMS:
            if present.issuperset(form.required.values()):
                return form
    seen = ", ".join(f"'{name}'" for name in list(values)[:12]) or "none"
    seen += f" and {len(values) - 12} more" if len(values) > 12 else ""
    known = "; ".join(", ".join(form.required.values()) for form in FORMS)
    raise DataError(
        f"the row fits no known form. Its columns: {seen}.",
        where=where,
        hint=f"{_nearest_form(set(values))}Forms: {known}. Rename with columns= (--column).",
    )


def _nearest_form(present: set[str]) -> str:
    def closeness(form: Form) -> float:
        required = form.required.values()
        return sum(max((difflib.SequenceMatcher(None, column.lower(), name.lower()).ratio()
                        for name in present), default=0.0) for column in required
                   ) / len(form.required)  # fmt: skip

    best = max(FORMS, key=closeness)
    if closeness(best) < 0.5:
        return ""
    missing = [column for column in best.required.values() if column not in present]
    free = present - set(best.required.values())
    parts = []
    for column in missing:
        close = difflib.get_close_matches(column, free, n=1, cutoff=0.6)
        parts.append(f"'{column}'" + (f" (is it '{close[0]}'?)" if close else ""))
    return f"Nearest: {best.title}; missing: {', '.join(parts)}. "


def _fields(
    form: Form,
    values: Mapping[str, Any],
    is_text: bool,
    notes: Notes,
    sources: Mapping[str, str],
) -> dict[str, Any]:
    fields = {field: values[column] for field, column in form.required.items()}
    for field, column in form.optional:
        value = values.get(column)
        if value is None:
            continue
        if field in TEXT_LISTS:
            # A single text where a list belongs is one item (TOFU's paraphrased columns).
            value = as_text(value, column, notes)
            if not isinstance(value, str | list | tuple):
                raise FormError(f"'{column}' must be a text or a list of texts, "
                                f"not {describe(value)}.")  # fmt: skip
            items = [value] if isinstance(value, str) else list(value)
            fields[field] = [*fields.get(field, []), *items]
        elif field not in fields:
            fields[field] = value
    options = [fields[one] for one in OPTIONS if one in fields] or fields.get("options")
    if has_number(options) and is_number(fields.get("correct")):
        # an index or an option's own text? as for a format that knows nothing but text
        fields["correct"], is_text = str(fields["correct"]), True
    fields = with_texts(fields, notes, sources)
    return form.prepare(fields, is_text) if form.prepare else fields


def places(found: Iterable[Located], limit: int = 3) -> str:
    """The first few places, for messages."""
    listed = [item.where for item in found]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
