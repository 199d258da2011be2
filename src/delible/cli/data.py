"""Data flags: from files and names to a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delible.cli import output
from delible.errors import DataError

if TYPE_CHECKING:
    from delible.records import ForgetRequest


def read_request(
    reporter: output.Reporter,
    *,
    forget: str | Path | None,
    subjects: Sequence[str] | None,
    retain: str | Path | None,
    neighbours: str | Path | None,
    holdout: str | Path | None,
    column: Sequence[str] | None,
    drop_overlap: bool,
) -> ForgetRequest:
    """The request that the data flags describe."""
    if forget is None and not subjects:
        raise DataError(
            "there is nothing to forget.",
            hint="Add --forget FILE with records, or --subjects NAME,… with names.",
        )
    from delible.loaders import build_request

    names = [name for given in subjects or () for name in given.split(",") if name.strip()]
    return build_request(
        forget=forget, subjects=names, retain=retain, neighbours=neighbours, holdout=holdout,
        columns=_columns(column or ()), drop_overlap=drop_overlap,
    )  # fmt: skip


def _columns(given: Iterable[str]) -> dict[str, str]:
    columns = {}
    for pair in given:
        known, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (known and equals and theirs):
            raise DataError(
                f"'{pair}' is no pair of columns.",
                where="--column",
                hint="Write the known name first: --column question=prompt.",
            )
        columns[known] = theirs
    return columns


def read_refusals(path: str | None) -> list[str] | None:
    """Sentences of a file, one a line."""
    if path is None:
        return None
    from delible.loaders import read_lines

    return read_lines(path)
