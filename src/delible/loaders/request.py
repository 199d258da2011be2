"""From files to a forget request, with the checks that keep a wrong one from costing a run."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime

from delible.errors import DataError
from delible.loaders.forms import fold
from delible.loaders.mapping import Located, places, read_located
from delible.loaders.sources import Source
from delible.records import (
    QA,
    Choice,
    Dialogue,
    ForgetRequest,
    Passage,
    Record,
    images_of,
)

logger = logging.getLogger(__name__)


def build_request(
    *,
    forget: Source | None = None,
    subjects: str | Sequence[str] = (),
    retain: Source | None = None,
    neighbours: Source | None = None,
    holdout: Source | None = None,
    columns: Mapping[str, str] | None = None,
    drop_overlap: bool = False,
) -> ForgetRequest:
    """Reads the parts of a request and checks them against each other.

    Args:
        forget: Records to forget; see :func:`~delible.loaders.mapping.read_records`.
        subjects: Names to forget (one name may be given as a plain text).
        retain: Records to keep.
        neighbours: Records close to the forgotten ones, to be kept and watched.
        holdout: Records of the same kind that the model never saw.
        columns: Known column name -> the sources' name for it, for every source.
        drop_overlap: Whether to drop rows from retain, neighbours and holdout that are also to
            be forgotten, instead of refusing the request.

    Raises:
        DataError: Nothing to forget; a row to be forgotten *and* kept (the same question and
            answer, or the same text, up to white space and case); or an unreadable source.
    """
    names = _subjects((subjects,) if isinstance(subjects, str) else subjects)
    sources = {"forget": forget, "retain": retain, "neighbours": neighbours, "holdout": holdout}
    parts = {
        part: [] if source is None else read_located(source, columns=columns, name=part)
        for part, source in sources.items()
    }
    if not parts["forget"] and not names:
        raise DataError(
            "there is nothing to forget.",
            where="request",
            hint="Give forget records (--forget) or names of subjects (--subjects).",
        )
    parts["forget"] = _without_duplicates(parts["forget"])
    for part in ("retain", "neighbours", "holdout"):
        parts[part] = _without_overlap(parts["forget"], parts[part], part, drop_overlap)
    records = {part: tuple(item.record for item in found) for part, found in parts.items()}
    return ForgetRequest(
        subjects=names, created=datetime.now(UTC).replace(microsecond=0), **records
    )


def _subjects(given: Sequence[str]) -> tuple[str, ...]:
    names: dict[str, str] = {}
    for number, name in enumerate(given, start=1):
        if not isinstance(name, str) or not name.strip():
            raise DataError("a subject must be a name.", where=f"subjects:{number}")
        names.setdefault(fold(name), name.strip())
    if len(names) < len(given):
        logger.warning(f"Dropped {len(given) - len(names)} repeated names from the subjects.")
    return tuple(names.values())


def fact(record: Record) -> tuple[Hashable, ...]:
    """What two records share when they say the same, up to white space and case.

    A multiple-choice question and a single exchange count as their question and answer; about
    other pictures it is another fact.
    """
    seen = tuple(image.sha256 for image in images_of(record))
    return (*_said(record), *seen)


def _said(record: Record) -> tuple[Hashable, ...]:
    match record:
        case QA():
            return ("qa", fold(record.question), fold(record.answer))
        case Choice():
            return ("qa", fold(record.question), fold(record.options[record.correct]))
        case Passage():
            return ("passage", fold(record.text))
        case Dialogue():
            turns = [(m.role, fold(m.text)) for m in record.messages if m.role != "system"]
            if [role for role, _ in turns] == ["user", "assistant"]:
                return ("qa", turns[0][1], turns[1][1])
            return ("dialogue", *turns)


def _without_duplicates(forget: list[Located]) -> list[Located]:
    kept: dict[Hashable, Located] = {}
    repeated = []
    for item in forget:
        # The same fact as a question and as a choice is two ways to ask, not a duplicate.
        options = item.record.options if isinstance(item.record, Choice) else ()
        key = (item.record.type, *fact(item.record), *sorted(fold(option) for option in options))
        if key in kept:
            repeated.append(item)
        else:
            kept[key] = item
    if repeated:
        logger.warning(
            f"Dropped {len(repeated)} repeated rows from the forget set: {places(repeated)}."
        )
    return list(kept.values())


def _without_overlap(
    forget: list[Located], kept: list[Located], part: str, drop: bool
) -> list[Located]:
    forgotten = {fact(item.record): item for item in reversed(forget)}
    shared = [item for item in kept if fact(item.record) in forgotten]
    if not shared:
        return kept
    if drop:
        logger.warning(
            f"Dropped {len(shared)} rows from {part} that are to be forgotten: {places(shared)}."
        )
        dropped = {id(item) for item in shared}
        return [item for item in kept if id(item) not in dropped]
    # Places, not texts: what is to be forgotten does not belong in logs.
    pairs = [f"{forgotten[fact(item.record)].where} = {item.where}" for item in shared[:3]]
    more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
    raise DataError(
        f"{len(shared)} rows are to be forgotten and also stand in {part}: "
        f"{', '.join(pairs)}{more}.",
        where="request",
        hint=f"Take them out of one of the two, or drop them from {part} with "
        "drop_overlap=True (--drop-overlap).",
    )
