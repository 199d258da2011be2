"""What a run made, in its folder: ``artefact.yaml`` says what kind it is, on what, in which parts.

    kind: patch                   how it is opened (delible list artefacts)
    base: {name: default, identity: 3f…}    what it stands on: a model, or another artefact
    parts: {patch: patch}         files and folders beside this file, by name
    options: {}                   what else the kind needs
    identity: 9a…                 of the whole, as it answered when it was made
    remembers: remembers          what the next request of the same method is to know
    enabled: true                 false: taken off (delible undo); it answers as its base
    without: [ada quill]          parts of it that are taken out (delible undo --only)

The file is written last, so that a folder with it holds everything that it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from delible.component import Config
from delible.errors import RecipeError, RunError
from delible.files import atomic_file
from delible.precision import BasePrecision

FILE = "artefact.yaml"
#: Of the file's form; a file of a later one is refused.
VERSION = 1


class Base(Config):
    """What an artefact stands on."""

    name: str = Field(description="What opens it: a model's name, a folder, an address.")
    identity: str | None = Field(
        None, description="Of its weights and template, or of all its parts; none: not known."
    )
    precision: BasePrecision | None = Field(
        None, description="That its weights are held in; none: as it is opened."
    )


class Artefact(Config):
    """What a run made. Equal content is the same artefact."""

    version: int = Field(VERSION, ge=1, description="Form of this file.")
    kind: str = Field(description="How it is opened.")
    base: Base | None = Field(None, description="What it stands on, or was made from.")
    parts: dict[str, str] = Field(default_factory=dict, description="Paths beside this file.")
    options: dict[str, Any] = Field(default_factory=dict, description="What the kind needs.")
    identity: str | None = Field(None, description="Of the whole when it was made.")
    remembers: str | None = Field(
        None, description="Folder beside this file: what the next request is to know; no answer "
        "depends on it.",
    )  # fmt: skip
    enabled: bool = Field(True, description="False: taken off, it answers as its base.")
    without: tuple[str, ...] | None = Field(
        None, description="What is taken out of it alone, by the names that its kind knows."
    )


def is_artefact(folder: Path) -> bool:
    """Whether a folder holds an artefact."""
    return (folder / FILE).is_file()


def write(artefact: Artefact, folder: Path) -> None:
    """Writes ``artefact.yaml``, atomically; call it when the parts are there."""
    content = artefact.model_dump(mode="json", exclude_none=True)
    with atomic_file(folder / FILE) as handle:
        yaml.safe_dump(content, handle, sort_keys=False, allow_unicode=True)


def read(folder: Path) -> Artefact:
    """Reads ``artefact.yaml``.

    Raises:
        RunError: It cannot be read, is of a later form, or names a part that is not there.
    """
    path = folder / FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise RunError(f"it cannot be read ({told}).", where=str(path)) from error
    if not isinstance(content, dict):
        raise RunError("it describes no artefact.", where=str(path))
    version = content.get("version", 1)
    if isinstance(version, int) and version > VERSION:
        raise RunError(
            f"it has the form {version}, this delible knows {VERSION}.",
            where=str(path),
            hint="A newer delible wrote it: update yours.",
        )
    try:
        artefact = Artefact.build(str(path), **content)
    except (RecipeError, TypeError) as error:
        raise RunError(f"it describes no artefact: {error}", where=str(path)) from error
    beside = {} if artefact.remembers is None else {"remembers": artefact.remembers}
    for name, part in {**artefact.parts, **beside}.items():
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise RunError(f"the part '{name}' lies outside the folder ({part}).", where=str(path))
        if not (folder / part).exists():
            raise RunError(
                f"the part '{name}' is missing.",
                where=str(folder / part),
                hint="Copy the whole folder, or delete it and run the same command again.",
            )
    return artefact
