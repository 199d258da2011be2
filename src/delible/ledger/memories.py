"""Memories of a request: what they hold of it is deleted with all that was made from it.

A memory deletes as a whole or not at all, and notes for which request it did. So whoever is killed
between the deletion and its event finds it there, and nothing is deleted twice. What a request
holds is looked for by its names, in any spelling, and by its texts; items that say the same in
other words and name nobody are not found, and every event says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import DelibleError
from delible.ledger.guarding import Done
from delible.ledger.private import redacted, secrets_of
from delible.ledger.requests import Request, Texts
from delible.ledger.store import Draft, Ledger
from delible.names import fold

if TYPE_CHECKING:
    from delible.memory import Certificate, Memory

#: Letters of a text by which items are told; shorter ones stand anywhere.
TELLING = 8
SPELLING = (
    "Other spellings of a name in the bytes of files: items are searched for them, files are not."
)


@dataclass(frozen=True)
class Sought:
    """By what items are found that hold something of a request.

    Attributes:
        names: In any spelling, in whatever an item holds.
        texts: Whole, but for case and spaces.
        passed_over: Records that are too short to be looked for.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    passed_over: int


def sought(texts: Texts) -> Sought:
    """What to look for: names, and of records that name nobody the question, else all they say."""
    from delible.memory.items import near
    from delible.memory.reading import item_of

    names = tuple(one for one in texts.names if fold(one).letters)
    said, short = [], 0
    for record in texts.records:
        item = item_of(record)
        text = item.text if record.subject else item.found_by
        if len(near(text)) >= TELLING:
            said.append(text)
        elif not record.subject:
            short += 1
    return Sought(names, tuple(dict.fromkeys(said)), short)


def forget_memories(
    ledger: Ledger, request: Request, texts: Texts | None, *, show: bool = False
) -> Iterator[Done]:
    """Deletes what a request holds from its memories, those that are not done yet.

    Args:
        show: Messages may tell what is forgotten.
    """
    for place, progress in request.remembered.items():
        if not progress.left:
            continue
        if texts is None:
            told = f"its texts are gone, so the memory {place} cannot be searched"
            yield Done(request.id, "held", told)
            continue
        if progress.begun is None:
            ledger.append(Draft("forgetting", request.id, body={"memory": place}))
        secrets = secrets_of(texts)
        try:
            found = _forgotten(opened(place), sought(texts), _reason(request))
        except Exception as error:  # it must not stop what else is to be done
            kind = type(error).__name__
            body = {"memory": place, "error": kind}
            ledger.append(Draft("not forgotten", request.id, body=body))
            words = str(error) if isinstance(error, DelibleError) else f"{kind}: {error}"
            words = words if show else redacted(words, secrets)
            yield Done(request.id, "failed", f"memory {place}: {words}")
            continue
        ledger.append(Draft("forgot", request.id, body={"memory": place, **found}))
        remains = found["verdict"] == "remains found"  # to do it again would not help: people must
        yield Done(
            request.id, "held" if remains else "forgotten", in_words({"memory": place, **found})
        )


def opened(place: str) -> Memory:
    """The memory that a request names: its folder, or the database in it.

    Raises:
        RunError: There is none.
    """
    from delible.memory import Memory

    path = Path(place).expanduser()
    return Memory(path.parent if path.is_file() else path, make_new=False)


def _reason(request: Request) -> str:
    return f"request {request.id}, {request.asked.hash}"


def _forgotten(memory: Memory, wanted: Sought, reason: str) -> dict[str, Any]:
    """What went from a memory for a request, now and before a kill, and what a scan says."""
    from delible.memory import NoMatchError

    try:
        deletion = memory.forget(subject=wanted.names, text=wanted.texts, reason=reason)
        certificate = memory.certificate(deletion)
    except NoMatchError:
        certificate = memory.certify((*wanted.names, *wanted.texts))
    removed: Counter[str] = Counter()
    for record in memory.deletions():
        if record.get("reason") == reason:
            removed.update(record["removed_by_kind"])
    return {"removed": dict(sorted(removed.items())), **_seen(certificate, wanted)}


def _seen(certificate: Certificate, wanted: Sought) -> dict[str, Any]:
    """A certificate of the memory, as the ledger writes it down: no word of what went."""
    verdict, reasons = certificate.verdict, list(certificate.reasons)
    if verdict == "nothing found" and not certificate.pieces:
        verdict, reasons = "not shown", ["There was nothing long enough to look for in files."]
    unknown = [*certificate.not_computed, *([SPELLING] if wanted.names else [])]
    if wanted.passed_over:
        unknown.append(
            f"{wanted.passed_over} records that name nobody and are too short to be looked for."
        )
    pieces = sum(count for kind, count in certificate.pieces.items() if kind != "otherwise")
    return {
        "verdict": verdict, "reasons": reasons, "state": certificate.state,
        "files": len(certificate.files), "pieces": pieces,
        "seen_before": certificate.seen_before, "stale": sorted(certificate.stale),
        "not_shown": unknown,
    }  # fmt: skip


def look_again(ledger: Ledger, request: Request, place: str, texts: Texts | None) -> dict[str, Any]:
    """Whether a memory holds something of a request again; what was seen is an event.

    Returns:
        ``outcome`` (*holds*, *leaks*, *as before*, *not asked*) and what was seen.
    """
    body = {"memory": place, **_looked(request, place, texts)}
    ledger.append(Draft("searched", request.id, body=body))
    return body


def _looked(request: Request, place: str, texts: Texts | None) -> dict[str, Any]:
    from delible.memory import NoMatchError

    if texts is None:
        return {"outcome": "not asked", "why": "its texts are gone"}
    wanted, secrets = sought(texts), secrets_of(texts)
    try:
        memory = opened(place)
        try:
            found = memory.closure(subject=wanted.names, text=wanted.texts)
            return {"outcome": "leaks", "items": len(found.roots())}
        except NoMatchError:
            seen = _seen(memory.certify((*wanted.names, *wanted.texts)), wanted)
    except DelibleError as error:
        return {"outcome": "not asked", "why": redacted(str(error), secrets)}
    forgot = request.remembered[place].forgot
    outcome = "holds"
    if seen["verdict"] == "remains found":
        before = forgot is not None and forgot.body["verdict"] == "remains found"
        outcome = "as before" if before else "leaks"
    return {"outcome": outcome, "items": 0, **seen}


def in_words(body: Mapping[str, Any]) -> str:
    """What an event says about a memory."""
    place = f"memory {body['memory']}"
    if body.get("error"):
        return f"{place}: {body['error']}"
    if body.get("why"):
        return f"{place}: {body['why']}"
    if body.get("items"):
        return f"{place}: items that hold it are there again ({body['items']})"
    if "verdict" not in body:
        return place
    said = " ".join(body["reasons"]).rstrip(".")
    if "removed" not in body:
        return f"{place}: no item holds it; {body['verdict']}: {said}"
    kinds = ", ".join(f"{count} of the kind {kind}" for kind, count in body["removed"].items())
    return f"{place}: {kinds or 'no item held it, none'} removed; {body['verdict']}: {said}"
