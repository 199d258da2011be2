"""Tables as text: CSV and its relatives, as spreadsheets and pandas write them.

The separator is read off the header: it is the one that the file's ending promises, unless the
header holds another one and not this one. Cells may be of any length.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator

from delible.errors import DataError
from delible.loaders.formats import Row, decode

logger = logging.getLogger(__name__)

#: Separators and what they are called, the likeliest first.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
#: The line with which Excel names the separator to itself.
_EXCEL = re.compile(r"sep=(.)\r?\n")


def read_separated(data: bytes, label: str, *, expected: str = ",") -> Iterator[Row]:
    """Rows of a table whose first line names the columns.

    Args:
        expected: The separator that the file's ending promises; another one is read and noted.

    Raises:
        DataError: A repeated column name, a row of another length, or broken quotes.
    """
    text = decode(data, label)
    skipped = 0
    if told := _EXCEL.match(text):
        separator, text, skipped = told[1], text[told.end() :], 1
    else:
        separator = _separator(text, expected)
    if separator != expected:
        logger.info(f"{label}: read as separated by {_called(separator)}.")
    header: list[str] = []
    line = 1 + skipped
    try:
        for cells, last in _records(text, separator):
            where, line = f"{label}:{line}", last + 1 + skipped
            if not any(cells):
                continue
            if not header:
                header = _header(cells, where)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"the row has {len(cells)} cells, the header {len(header)} "
                    f"(separated by {_called(separator)}).",
                    where=where,
                    hint=f"Put cells that hold {_called(separator)} or line breaks in double "
                    "quotes.",
                )
            named = zip(header, cells, strict=True)
            yield Row(where, {name: cell or None for name, cell in named if name}, is_text=True)
    except csv.Error as error:
        raise DataError(
            f"broken CSV: {error}.",
            where=f"{label}:{line}",
            hint="Check the quotes of this row, or use JSONL.",
        ) from None


def _records(text: str, separator: str) -> Iterator[tuple[list[str], int]]:
    """(cells, number of its last line) of each record."""
    # strict: an unclosed quote would otherwise swallow the rest of the file in silence
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        # the limit belongs to the whole process, so it is only lifted while a record is read
        limit = csv.field_size_limit(max(len(text), 1))
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells, reader.line_num


def _separator(text: str, expected: str) -> str:
    """The expected separator if the header holds it, else the one with the most columns."""
    widths = {one: _width(text, one) for one in (expected, *SEPARATORS)}
    if widths[expected] > 1:
        fitting = [one for one, width in widths.items() if width > 1 and _even(text, one, width)]
        return expected if expected in fitting or not fitting else fitting[0]
    return max(widths, key=lambda one: widths[one])


def _width(text: str, separator: str) -> int:
    """Columns of the header if this were the separator; 0 if it cannot be."""
    try:
        return next((len(cells) for cells, _ in _records(text, separator) if any(cells)), 0)
    except csv.Error:
        return 0


def _even(text: str, separator: str, width: int) -> bool:
    """Whether every record would have as many cells as the header."""
    try:
        return all(len(cells) == width for cells, _ in _records(text, separator) if any(cells))
    except csv.Error:
        return False


def _header(cells: list[str], where: str) -> list[str]:
    """The names of the columns; a column without one is not read, and that is noted."""
    header = [cell.strip() for cell in cells]
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise DataError(
            "the header has a repeated column name.",
            where=where,
            hint=f"It reads: {', '.join(repr(name) for name in header)}.",
        )
    places = [str(place) for place, name in enumerate(header, start=1) if not name]
    if places:
        plural = "s" if len(places) > 1 else ""
        index = " (the index that pandas writes?)" if places == ["1"] else ""
        logger.warning(
            f"{where}: column{plural} {', '.join(places)} without a name not read{index}."
        )
    return header


def _called(separator: str) -> str:
    return SEPARATORS.get(separator, f"'{separator}'")
