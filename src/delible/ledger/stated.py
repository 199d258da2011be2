"""What a certificate must be, and whether a run and a ledger agree with what it states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from delible.errors import RunError
from delible.ledger.chain import Event
from delible.ledger.evidence import file_hashes
from delible.ledger.export import head_of
from delible.ledger.statement import PREDICATE, TYPE


class _Form(BaseModel):
    """What is read of a certificate; it says more."""

    model_config = ConfigDict(strict=True)


class _Request(_Form):
    id: str
    hash: str
    event: int


class _Done(_Form):
    kind: str
    files: dict[str, str] = {}


class _Verdict(_Form):
    label: str
    words: str


class _Event(_Form):
    sequence: int
    hash: str


class _Head(_Form):
    size: NonNegativeInt


class _Predicate(_Form):
    made: str
    request: _Request
    ledger: _Head
    model: str
    done: _Done
    tested: list[Any]
    not_tested: list[str]
    verdict: _Verdict
    events: list[_Event]


class _Subject(_Form):
    name: str
    digest: dict[str, str]


class _Statement(_Form):
    subject: list[_Subject] = Field(min_length=1)
    predicate: _Predicate


def check_statement(content: Any, where: str) -> dict[str, Any]:
    """A statement that has the form of a certificate.

    Raises:
        RunError: It has not.
    """
    if not isinstance(content, dict) or content.get("_type") != TYPE:
        raise RunError("it holds no in-toto statement (v1).", where=where)
    if content.get("predicateType") != PREDICATE:
        raise RunError("it is a statement about something else.", where=where)
    try:
        read = _Statement.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"the certificate lacks '{field}', or has it in another form.", where=where
        ) from None
    told = read.predicate
    if {one.digest.get("sha256") for one in read.subject} != {
        told.request.hash, *told.done.files.values(),
    }:  # fmt: skip
        raise RunError("its subjects are not the request and the files it tells of.", where=where)
    return content


def check_artefact(content: Mapping[str, Any], folder: Path) -> None:
    """Whether a run's files are those that a certificate is about.

    Raises:
        RunError: They are not.
    """
    promised = content["predicate"]["done"].get("files")
    if not promised:
        raise RunError("the certificate is about no files: only a guard stands.", where=str(folder))
    found = file_hashes(folder)
    for name in sorted({*promised, *found}):
        if promised.get(name) != found.get(name):
            state = "is missing" if name not in found else (
                "is not part of the certificate" if name not in promised else "was changed"
            )  # fmt: skip
            raise RunError(f"'{name}' {state}.", where=str(folder))


def check_events(content: Mapping[str, Any], events: Sequence[Event], where: str) -> None:
    """Whether a ledger has the events that a certificate names, and no others of its request.

    Raises:
        RunError: It has not.
    """
    by_place = {one.sequence: one.hash for one in events}
    predicate = content["predicate"]
    name, model = predicate["request"]["id"], predicate["model"]
    places = {one["sequence"]: one["hash"] for one in predicate["events"]}
    for place, digest in places.items():
        if by_place.get(place) != digest:
            raise RunError(
                f"event {place} of the ledger is not the one of the certificate.", where=where
            )
    size = int(predicate["ledger"]["size"])
    if head_of(events[:size]) != predicate["ledger"]:
        raise RunError("the ledger's root is not the one of the certificate.", where=where)
    mine = [one for one in events[:size] if one.request == name and one.model in (None, model)]
    if {one.sequence: one.hash for one in mine} != places:
        raise RunError(
            f"the certificate leaves out events of request {name}, or names those of another one.",
            where=where,
        )
    asked = next((one for one in mine if one.kind == "requested"), None)
    if asked is None or asked.hash != predicate["request"]["hash"]:
        raise RunError(f"its hash is not that of request {name}.", where=where)
