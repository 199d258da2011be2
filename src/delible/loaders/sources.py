"""Where rows come from: a file, standard input, a data set of the hub or in memory, a list."""

from __future__ import annotations

import gzip
import importlib
import logging
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from delible.errors import DataError, MissingExtraError, nearest
from delible.loaders.formats import (
    Reader,
    Row,
    as_object,
    describe,
    lines,
    read_json,
    read_json_lines,
    read_paragraphs,
    read_parquet,
)
from delible.loaders.separated import read_separated
from delible.records import Record, RecordBase

logger = logging.getLogger(__name__)

#: What reads a file, by its ending.
READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_separated,
    ".tsv": partial(read_separated, expected="\t"),
    ".parquet": read_parquet,
    ".txt": read_paragraphs,
}


@runtime_checkable
class Table(Protocol):
    """What is used of a ``datasets.Dataset``: named columns, and rows that are mappings."""

    @property
    def column_names(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


#: A path, ``"-"`` (standard input), ``"hf:owner/name[:config][:split]"``, a data set, or rows.
Source = str | Path | Table | Sequence[Mapping[str, Any] | Record]


def read_rows(source: Source, *, name: str = "records") -> Iterator[Row]:
    """The rows of any source, in order.

    Args:
        name: What to call an in-memory source in messages.

    Raises:
        DataError: The source is missing, unreadable or not of a known format.
        MissingExtraError: A Parquet file or hub data set without the package that reads it.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub_rows(source)
    if isinstance(source, str | Path):
        return _file_rows(source)
    if isinstance(source, Mapping):
        if len(source) == 1 and isinstance(only := next(iter(source.values())), Table):
            return _numbered(only, name)
        parts = ", ".join(f"'{key}'" for key in source)
        raise DataError(
            f"is a single mapping with the keys {parts}.",
            where=name,
            hint="Give one split of a data set, or a list of rows.",
        )
    if isinstance(source, Table | Sequence):
        return _numbered(source, name)
    raise DataError(
        f"{describe(source)} is no source of records.",
        where=name,
        hint="Give a path, 'hf:owner/name', a data set or a list of rows.",
    )


def _numbered(rows: Table | Sequence[Any], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        where = f"{name}:{number}"
        yield Row(where, row if isinstance(row, RecordBase) else as_object(row, where))


# Files


def _file_rows(source: str | Path) -> Iterator[Row]:
    label = str(source)
    if label == "-":
        return READERS[".jsonl"](sys.stdin.buffer.read(), "stdin")
    path = Path(source).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    data = _load(path, label)
    if suffix not in READERS:
        raise DataError(
            f"unknown file format '{suffix}'.",
            where=label,
            hint=f"Known: {', '.join(READERS)}, and each with .gz behind it.",
        )
    return READERS[suffix](data, label)


def _load(path: Path, label: str) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if READERS.keys() & set(p.suffixes))
        hint = f"It holds {', '.join(inside[:5])}." if inside else "Name a file."
        raise DataError("is a folder, not a file.", where=label, hint=hint)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise DataError("no such file.", where=label, hint=_hint_for_missing(path)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"broken gzip file ({error}).", where=label) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", where=label) from None
    if not data.strip():
        raise DataError("the file is empty.", where=label)
    return data


def _hint_for_missing(path: Path) -> str:
    if not path.parent.is_dir():
        hint = f"The folder '{path.parent}' does not exist."
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix:
            hint += f" For a data set on the Hugging Face hub write 'hf:{path}'."
        return hint
    files = [p.name for p in path.parent.iterdir() if p.is_file() and not p.name.startswith(".")]
    if not files:
        return f"The folder '{path.parent}' holds no files."
    hint = nearest(path.name, files)
    return hint if hint.startswith("Did") else "Check the name and the folder."


def read_lines(path: str | Path) -> list[str]:
    """The non-blank lines of a plain text file (such as a list of refusals), whatever its name.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    data = _load(Path(path).expanduser(), str(path))
    return [line.strip() for _, line in lines(data, str(path)) if line.strip()]


# The hub


def _hub_rows(source: str) -> Iterator[Row]:
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError("is no name of a data set.", where=source, hint="Write hf:owner/name.")
    config, split = (*rest, "", "")[:2]
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtraError(f"Reading '{source}' from the hub", "data") from None
    logger.info(f"Loading the data set '{name}' from the Hugging Face hub (or its cache).")
    try:
        found = datasets.load_dataset(name, config or None, split=split or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"the data set cannot be loaded ({reason}).",
            where=source,
            hint="Write hf:owner/name:config:split; a split alone is hf:owner/name::split.",
        ) from None
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise DataError(
                f"the data set has the splits {', '.join(found)}.",
                where=source,
                hint=f"Name one: 'hf:{name}:{config}:{next(iter(found), 'train')}'.",
            )
        found = next(iter(found.values()))
    return _numbered(found, source)
