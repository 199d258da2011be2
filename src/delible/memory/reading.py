"""Items from files: rows with a text, or any records that delible reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from delible.errors import DataError, nearest
from delible.loaders import read_records
from delible.loaders.sources import read_rows
from delible.memory.items import Item
from delible.records import QA, Choice, Passage, RecordBase

#: Columns that only an item has.
OWN = {"id", "kind", "key", "source", "data", "parents"}


def read_items(path: str | Path) -> list[Item]:
    """The items of a file.

    Args:
        path: Rows that have a ``text`` (and the other fields of an :class:`Item`), or records.

    Raises:
        DataError: A row cannot be used; says where.
    """
    rows = list(read_rows(path))
    if not rows:
        raise DataError("holds no items.", where=str(path))
    columns = set(rows[0].content) if isinstance(rows[0].content, Mapping) else set()
    if "text" not in columns or not (columns == {"text"} or columns & OWN):
        return [item_of(one) for one in read_records(path)]
    items = []
    for row in rows:
        try:
            items.append(Item.model_validate(row.content))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                hint = nearest(key, Item.model_fields)
                raise DataError(f"unknown field '{key}'.", where=row.where, hint=hint) from None
            raise DataError(f"'{key}': {problem['msg']}.", where=row.where) from None
    return items


def item_of(record: RecordBase) -> Item:
    """A record as an item: found by its question, with question and answer as its text."""
    match record:
        case QA():
            key, text = record.question, f"{record.question}\n{record.answer}"
        case Choice():
            key = record.question
            text = f"{record.question}\n{record.options[record.correct]}"
        case Passage():
            key, text = "", record.text
        case _:
            turns = getattr(record, "messages", ())
            key, text = "", "\n".join(f"{turn.role}: {turn.text}" for turn in turns)
    return Item(text=text, key=key, subject=record.subject or "")


__all__ = ["item_of", "read_items"]
