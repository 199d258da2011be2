"""Records out: JSONL, whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from delible.errors import DataError
from delible.loaders.checking import check_record
from delible.records import RecordBase, to_json_line

WRITABLE = (".jsonl", ".ndjson", ".json")


def write_records(records: Sequence[RecordBase], path: str | Path) -> None:
    """Writes JSONL (gzip under ``.gz``), whole or not at all; the folder is made if needed.

    What was written can be read back and is equal: a record that
    :func:`~delible.loaders.mapping.read_records` would refuse is refused here.

    Raises:
        DataError: No records, a record that could not be read back, a name that is not that
            of a JSONL file, or a path that cannot be written.
    """
    path = Path(path).expanduser()
    zipped = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    if suffix not in WRITABLE:
        raise DataError(
            f"records are written as JSONL, not as '{suffix}'.",
            where=str(path),
            hint="Choose a name that ends in .jsonl or .jsonl.gz.",
        )
    if not records:
        raise DataError("there are no records to write.", where=str(path))
    for number, record in enumerate(records, start=1):
        check_record(record, f"records:{number}")
    data = "".join(f"{to_json_line(record)}\n" for record in records).encode()
    # A fixed time stamp: the same records are the same bytes.
    write_atomically(path, gzip.compress(data, mtime=0) if zipped else data)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: no half file is ever seen.

    Raises:
        DataError: The path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error}).", where=str(path)
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
