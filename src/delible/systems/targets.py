"""Targets: who or what must not come out, in one file that guards share and an operator edits.

    targets:
      - id: ada-brook
        names: [Ada Brook]
        aliases: [A. Brook, The Grey Fox]       optional, like everything below
        description: A lighthouse keeper's daughter who wrote three novels.
        records: [{question: Where was Ada Brook born?, answer: Vellmar}]      or a file of records
        asked_by: request 2024-117
        until: 2030-01-01                        the last day on which it counts

A JSONL file has one target per line. A file is read whole or not at all, and what is wrong with it
is told by file, line and field, never by what the field holds.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delible.errors import DataError, DelibleError, nearest
from delible.files import Followed, atomic_file
from delible.loaders import read_records
from delible.names import fold
from delible.records import ForgetRequest, Passage, Record, Text

logger = logging.getLogger(__name__)

_JSON_LINES = (".jsonl", ".ndjson")


class Target(BaseModel):
    """Somebody, or something, that must not come out.

    Attributes:
        id: By which it is spoken of in logs and ledgers; tells nothing about it.
        names: Full names.
        aliases: Other names.
        description: A sentence or two, for guards that compare meanings.
        records: What is forgotten about it.
        asked_by: Who asked for it, or the number of the request.
        until: The last day on which it counts; None: for ever.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    names: tuple[Text, ...] = Field(min_length=1)
    aliases: tuple[Text, ...] = ()
    description: Text | None = None
    records: tuple[Record, ...] = ()
    asked_by: Text | None = None
    until: date | None = None


class Targets(BaseModel):
    """Everything in a file of targets, in its order."""

    model_config = ConfigDict(frozen=True)

    targets: tuple[Target, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def on(self, day: date) -> Targets:
        """Those that count on a day."""
        left = tuple(one for one in self.targets if one.until is None or day <= one.until)
        return Targets(targets=left)

    def aliases(self) -> dict[str, list[str]]:
        """Other names, by the first one: the option ``aliases`` of guards that have it."""
        others = {one.names[0]: [*one.names[1:], *one.aliases] for one in self.targets}
        return {name: given for name, given in others.items() if given}

    def request(self, *, names: bool = True, retain: Sequence[Record] = ()) -> ForgetRequest:
        """As a forget request: first names as subjects, records and descriptions to forget.

        Args:
            names: Whether other names and aliases are subjects too.
            retain: Records to keep.
        """
        forget: list[Record] = []
        subjects: dict[str, None] = {}
        for one in self.targets:
            subjects.update(dict.fromkeys(one.names if names else one.names[:1]))
            subjects.update(dict.fromkeys(one.aliases if names else ()))
            forget += [
                record if record.subject else record.model_copy(update={"subject": one.names[0]})
                for record in one.records
            ]
            if one.description:
                forget.append(Passage(text=one.description, subject=one.names[0]))
        return ForgetRequest(forget=tuple(forget), subjects=tuple(subjects), retain=tuple(retain))


def read_targets(path: str | Path) -> Targets:
    """Reads a file of targets (.yaml, .yml, .json, or .jsonl with one per line).

    Raises:
        DataError: It cannot be read, or something in it cannot be used; tells file, line and
            field, and not what is written there.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"cannot be read ({reason}).", where=str(path)) from None
    lines = path.suffix.lower() in _JSON_LINES
    found = list(_json_lines(text, path) if lines else _yaml(text, path))
    if not found:
        raise DataError(
            "holds no targets.", where=str(path), hint="'delible targets' makes such a file."
        )
    seen: dict[str, int] = {}
    targets: list[Target] = []
    for line, content in found:
        target = _target(content, f"{path}:{line}", path.parent)
        if target.id in seen:
            raise DataError(
                f"the id of line {seen[target.id]} is used again.", where=f"{path}:{line}"
            )
        seen[target.id] = line
        targets.append(target)
    return Targets(targets=tuple(targets))


def write_targets(targets: Targets, path: str | Path) -> None:
    """Writes a file of targets, whole or not at all; ``.jsonl`` has one per line."""
    path = Path(path)
    content = [one.model_dump(mode="json", exclude_defaults=True) for one in targets.targets]
    for one, target in zip(content, targets.targets, strict=True):
        if target.records:  # the kind of a record is a default, and told all the same
            one["records"] = [
                {"type": record.type, **record.model_dump(mode="json", exclude_defaults=True)}
                for record in target.records
            ]
    with atomic_file(path) as handle:
        if path.suffix.lower() in _JSON_LINES:
            handle.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in content)
        else:
            yaml.safe_dump({"targets": content}, handle, sort_keys=False, allow_unicode=True)


def changed(targets: Targets, add: Sequence[str], remove: Sequence[str]) -> Targets:
    """The targets with some names added, and some taken out, all of them or none.

    Args:
        add: Names; one that is a target already adds nothing.
        remove: Names, aliases or ids of targets.

    Raises:
        DataError: A name to take out is no target's, a name to add would match everywhere, or no
            target would be left; tells which place in the list, and not the name.
    """
    left = list(targets.targets)
    for place, given in enumerate(remove, start=1):
        gone = [one for one in left if given == one.id or fold(given).letters in _folded(one)]
        if not gone:
            raise DataError(f"number {place} of those to remove is no target.", where="remove")
        left = [one for one in left if one not in gone]
    for place, name in enumerate(add, start=1):
        if len(fold(name).letters) < 2:
            raise DataError(
                f"number {place} of those to add has fewer than two letters.", where="add"
            )
        if not any(fold(name).letters in _folded(one) for one in left):
            # the id tells nothing about whom it is of
            left.append(Target(id=uuid.uuid4().hex[:12], names=(name,)))
    if not left:
        raise DataError("no target would be left.", where="remove", hint="Stop the guard instead.")
    return Targets(targets=tuple(left))


def _folded(target: Target) -> list[str]:
    return [fold(name).letters for name in (*target.names, *target.aliases)]


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                raise DataError("is no JSON.", where=f"{path}:{number}") from None


def _yaml(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            items = _items(node, path)
            for item in items:
                yield item.start_mark.line + 1, loader.construct_document(item)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError("is no YAML.", where=where) from None


def _items(node: Any, path: Path) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value != "targets":
                raise DataError(
                    "an unknown key beside 'targets'.", where=f"{path}:{key.start_mark.line + 1}"
                )
            node = value
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if node is None or isinstance(node, yaml.MappingNode):
        return []
    raise DataError("holds no list of targets.", where=str(path), hint="Write 'targets: [...]'.")


def _target(content: Any, where: str, folder: Path) -> Target:
    if not isinstance(content, Mapping):
        raise DataError("is no target: fields are wanted.", where=where)
    unknown = [str(key) for key in content if key not in Target.model_fields]
    if unknown:
        raise DataError(
            f"unknown field '{unknown[0]}'.",
            where=where,
            hint=nearest(unknown[0], Target.model_fields),
        )
    content = {**content}
    records = content.get("records")
    if isinstance(records, str):
        records = folder / records
    if records:
        try:
            content["records"] = tuple(read_records(records))
        except DelibleError as error:
            raise DataError(
                f"'records' cannot be used ({error.where or 'records'}).", where=where
            ) from None
    for field in ("names", "aliases"):
        if isinstance(content.get(field), str):
            content[field] = [content[field]]
    try:
        target = Target.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"])
        raise DataError(f"'{field}': {first['msg']}.", where=where) from None
    for field, names in (("names", target.names), ("aliases", target.aliases)):
        for place, name in enumerate(names, start=1):
            if len(fold(name).letters) < 2:
                raise DataError(
                    f"'{field}.{place}' has fewer than two letters and would match everywhere.",
                    where=where,
                )
    return target


class _FileError(DataError):
    """The file itself is wrong."""


class Reloading:
    """Keeps what is made from a file of targets up to date.

    A file that changed is read aside, and what is made of it takes the place of the old in one
    step: who uses the old goes on with it. A file that cannot be used changes nothing, and the
    log says so.

    Args:
        path: The file.
        make: Makes something of targets.
        use: Is handed what was made.
        today: Which day it is.

    Raises:
        DelibleError: The file cannot be used now: there is nothing to go on with.
    """

    def __init__(
        self,
        path: str | Path,
        make: Callable[[Targets], Any],
        use: Callable[[Any], None],
        today: Callable[[], date] = date.today,
    ) -> None:
        self.path, self._make, self._use, self._today = Path(path), make, use, today
        self._lock = threading.Lock()
        self._file, self._day = Followed(self.path), today()
        self.count = 0
        self._load()

    def poll(self) -> bool:
        """Reads the file again if it changed, or if another day began; whether something did.

        Call it from time to time, from any thread; it does not wait for a reload under way.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            day = self._today()
            if not self._file.changed() and (day == self._day or not self.path.exists()):
                return False
            self._day = day
            try:
                self._load()
            except Exception as error:  # whatever is wrong with it, the old targets go on
                # Errors of a guard may name a target; those of the file do not.
                told = str(error) if isinstance(error, _FileError) else type(error).__name__
                logger.warning(
                    "the new targets cannot be used; the %d old ones stay: %s", self.count, told
                )
                return False
            logger.info("%s was read again: %d targets.", self.path, self.count)
            return True
        finally:
            self._lock.release()

    def change(self, add: Sequence[str], remove: Sequence[str]) -> int:
        """Changes the file, and goes by it at once; returns how many targets there are then.

        Raises:
            DataError: As for :func:`changed`, or what is made of targets refuses them: then the
                file is as it was.
        """
        with self._lock:
            before = read_targets(self.path)
            write_targets(changed(before, add, remove), self.path)
            try:
                self._load()
            except Exception as error:
                write_targets(before, self.path)
                raise DataError(  # the guard's own words may name a target
                    f"the guard cannot go by these targets ({type(error).__name__})."
                ) from None
            finally:
                self._file.seen()
            return self.count

    def _load(self) -> None:
        try:
            targets = read_targets(self.path).on(self._today())
        except DataError as error:
            raise _FileError(error.problem, where=error.where, hint=error.hint) from None
        made = self._make(targets)
        self._use(made)
        self.count = len(targets)


__all__ = ["Reloading", "Target", "Targets", "read_targets", "write_targets"]
