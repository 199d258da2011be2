"""File formats: from bytes to rows, each with its place.

A row is still in its author's words (any column names); :mod:`delible.loaders.mapping` turns
it into a record. Text is split into lines on ``"\n"`` only, because ``str.splitlines`` also
splits on characters such as U+2028 that stand inside JSON strings.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delible.errors import DataError, MissingExtraError
from delible.records import RecordBase

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = re.compile(r"[ \t\n\r]*")


#: Takes a note for the user, one sentence.


@dataclass(frozen=True)
class Row:
    """One row and where it stands.

    Attributes:
        where: ``"path:line"``, counted from 1 (a row number where there are no lines).
        content: Column -> value, or a finished record.
        is_text: Whether every value is text because the format knows nothing else (CSV).
    """

    where: str
    content: Mapping[str, Any] | RecordBase
    is_text: bool = False


#: Reads a file's content: (data, what to call it, who takes notes).
Reader = Callable[[bytes, str], Iterator[Row]]


def describe(value: Any) -> str:
    """A value in words, for error messages."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, Sequence) else f"a {type(value).__name__}"


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """The value, if it has named columns."""
    if isinstance(value, Mapping):
        return value
    hint = "Every row must be an object with named columns."
    if isinstance(value, list):
        hint += " A file that holds one JSON array must be named .json."
    raise DataError(f"expected an object, found {describe(value)}.", where=where, hint=hint)


def decode(data: bytes, label: str) -> str:
    """UTF-8 text, without a byte-order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte-order mark; users count from the file's start.
        offset = error.start + (len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0)
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise DataError(
            f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset}.",
            where=f"{label}:{data.count(bytes([10]), 0, offset) + 1}",
            hint=f"It looks like {encoding}. Save the file as UTF-8.",
        ) from None


def lines(data: bytes, label: str) -> Iterator[tuple[int, str]]:
    """(number, line) without line ends; numbers count from 1."""
    for number, line in enumerate(decode(data, label).split("\n"), start=1):
        yield number, line.removesuffix("\r")


def read_json_lines(data: bytes, label: str) -> Iterator[Row]:
    """One JSON object a line."""
    for number, line in lines(data, label):
        if not line.strip(" \t\r"):
            continue
        where = f"{label}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = (
                "A file that holds one JSON array must be named .json."
                if line.lstrip().startswith("[")
                else "Every line must hold one JSON object; plain text belongs in a .txt file."
            )
            raise _broken(error, where, hint) from None
        yield Row(where, as_object(value, where))


def _broken(error: ValueError | RecursionError, where: str, hint: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(
            f"broken JSON: {error.msg} at column {error.colno}.", where=where, hint=hint
        )
    return DataError(f"JSON that cannot be read: {error}.", where=where, hint=hint)


def read_json(data: bytes, label: str) -> Iterator[Row]:
    """One array or object, or JSON Lines under this name (as TOFU is released)."""
    text = decode(data, label)
    start = _skip_space(text, 0)
    is_array = text.startswith("[", start)
    try:
        items = (
            list(_array_items(text, start))
            if is_array
            else [(text.count("\n", 0, start) + 1, json.loads(text))]
        )
    except (ValueError, RecursionError) as error:
        # A line that is only "{" opens a pretty-printed object: not JSON Lines, just broken.
        if is_array or text[start:].split("\n", 1)[0].strip() == "{":
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise _broken(error, f"{label}:{line}", "Check the file's brackets.") from None
        yield from read_json_lines(data, label)
        return
    for line, value in items:
        yield Row(f"{label}:{line}", as_object(value, f"{label}:{line}"))


def _skip_space(text: str, position: int) -> int:
    found = JSON_SPACE.match(text, position)
    return found.end() if found else position


def _array_items(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item of the array that opens at ``start``; json has no lines."""
    decoder = json.JSONDecoder()
    position, counted, line = _skip_space(text, start + 1), 0, 1
    at_end = text.startswith("]", position)
    while not at_end:
        line, counted = line + text.count("\n", counted, position), position
        value, end = decoder.raw_decode(text, position)
        yield line, value
        position = _skip_space(text, end)
        at_end = text.startswith("]", position)
        if not at_end:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = _skip_space(text, position + 1)
    if (rest := _skip_space(text, position + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def read_paragraphs(data: bytes, label: str) -> Iterator[Row]:
    """Plain text: a passage for each paragraph."""
    first, paragraph = 1, list[str]()
    for number, line in (*lines(data, label), (0, "")):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Row(f"{label}:{first}", {"text": "\n".join(paragraph)})
            paragraph = []


def read_parquet(data: bytes, label: str) -> Iterator[Row]:
    """The rows of a Parquet file."""
    try:
        pyarrow, parquet = (importlib.import_module(m) for m in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise MissingExtraError("Reading a Parquet file", "data") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(io.BytesIO(data)).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{label}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"broken Parquet file ({error}).", where=label) from None
