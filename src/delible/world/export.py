"""A world as a folder of JSON Lines files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delible.errors import DataError
from delible.files import atomic_file, write_json
from delible.records import RecordBase, digest, to_json_line
from delible.world import common
from delible.world.graph import Person
from delible.world.split import Form, Part, Split

PARTS: tuple[Part, ...] = ("forget", "neighbours", "retain", "bridge", "holdout")
FORMS: tuple[Form, ...] = ("choice", "cloze", "reverse", "passage", "multi_hop")
FORMAT = 1


def write(options: Mapping[str, Any], people: Sequence[Person], split: Split, folder: Path) -> Path:
    """Writes every file of ``World.export``; each takes its name only when it is complete.

    Raises:
        DataError: The folder is a file, or cannot be made.
        RunError: The disk is full, or the folder may not be written to.
    """
    files: dict[str, Sequence[RecordBase]] = {part: split.records(part) for part in PARTS}
    for form in FORMS:
        files[form] = [row for part in PARTS for row in split.records(part, form)]
    files["general"] = common.general()
    files["general_choice"] = common.general_choices()
    files["unrelated"] = common.unrelated()
    description = {
        "format": FORMAT,
        "options": dict(options),
        "relations": list(dict.fromkeys(fact.relation.name for fact in split.facts)),
        "people": {
            part: [person.name for person in getattr(split, part)]
            for part in ("forget", "neighbours", "retain", "holdout")
        },
        "aliases": {person.name: list(person.aliases) for person in people},
        "files": {
            f"{name}.jsonl": {"rows": len(rows), "sha256_of_records": digest(rows)}
            for name, rows in files.items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(
            "is not a folder.", where=str(folder), hint="Give a new or an existing folder."
        ) from None
    for name, rows in files.items():
        with atomic_file(folder / f"{name}.jsonl") as handle:
            handle.writelines(f"{to_json_line(row)}\n" for row in rows)
    write_json(folder / "world.json", description)
    return folder
