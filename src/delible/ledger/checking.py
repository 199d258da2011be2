"""Looking again: does a system say what was to be forgotten, after a merge, a new base, a
quantization?

Its answers to the forgotten questions are compared with those of the day when the request was
carried out: *leaks* when it says again what was not said then, or gives the right answers a
probability that went back by more than a fifth of the way; *as before* when it is not worse than
then, but too much was left then already. An audit on top also attacks it. Memories that forgot are
searched for what is there again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from delible.achieved import SMALLEST, STILL_SAID, Measured, compare, probabilities
from delible.errors import DataError, DelibleError
from delible.ledger.evidence import change_numbers
from delible.ledger.memories import in_words, look_again
from delible.ledger.private import discreet, redacted, secrets_of
from delible.ledger.progress import Progress
from delible.ledger.requests import Request, requests_of, texts_of
from delible.ledger.store import Draft, Ledger
from delible.records import ForgetRequest, RecordBase
from delible.system.base import identity_of

Outcome = Literal["holds", "leaks", "as before", "not asked"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
#: Without numbers of the day: answers may be this probable, on average.
PROBABLE = 0.1


@dataclass(frozen=True)
class Looked:
    """What a system still says of one request.

    Attributes:
        numbers: Answers now.
        audit: Verdict, attacks and what was not tested, where it was attacked.
        unasked: Records that it was not asked about, or gave no answer to.
    """

    request: str
    outcome: Outcome
    told: str
    numbers: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None
    unasked: int = 0


def outcome(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> tuple[Outcome, str]:
    """Whether it leaks, and why.

    Args:
        then: Numbers of the run's forget answers (before, after, said); None: none were taken, as
            where only a guard stands.
        now: The same numbers of the system in question; only ``after`` counts.
    """
    said, rows = _said(now)
    if then is None:
        bad = said > STILL_SAID * rows if rows else float(now["after"]) > PROBABLE
        words = f"{said} of {rows} answers are said" if rows else f"probability {now['after']}"
        return ("leaks" if bad else "holds"), words
    reasons, left = [], []
    if then.get("said") and rows:
        share = then["said"]["after"] / then["said"]["rows"]
        before = max(then["said"]["before"] / then["said"]["rows"], share)
        room = before - share if before > share else 1.0
        if said / rows - share > STILL_SAID * room:
            reasons.append(f"{said} of {rows} answers are said again ({share * rows:.0f} then)")
        elif before and share / before > STILL_SAID:
            left.append(f"{said} of {rows} answers are said, as then")
    if not (then["texts_only"] or now["texts_only"]):
        before, after, found = (float(one) for one in (then["before"], then["after"], now["after"]))
        way = before - after
        limit = STILL_SAID * way if way > SMALLEST else PROBABLE
        if found - after > max(limit, SMALLEST):
            reasons.append(
                f"their probability is {found:.3f} ({after:.3f} then, {before:.3f} before)"
            )
    if reasons:
        return "leaks", "; ".join(reasons)
    if left:
        return "as before", "; ".join(left)
    words = f"{said} of {rows} answers are said" if rows else "no answer was generated"
    return "holds", f"{words}, probability {now['after']}"


def compared(applied: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Outcome, str]:
    """As :func:`outcome`, against what the ledger says of the run that carried a request out.

    A run of another request, with more records than this one has, was measured as a mean over all
    of these. How many of them were said then tells nothing of these few, so none may be said.

    Args:
        applied: Of the run; empty if there was none.
        now: Numbers of today.
    """
    then = (applied.get("achieved") or {}).get("forget")
    if then is None or "same_as" not in applied or then["rows"] == now["rows"]:
        return outcome(then, now)
    found, told = outcome(None, now)
    if found == "holds":
        found, told = outcome({**then, "said": None}, now)
    return found, f"{told}; that day they were counted among those of {applied['same_as']}"


def _said(numbers: Mapping[str, Any]) -> tuple[int, int]:
    said = numbers.get("said")
    return (said["after"], said["rows"]) if said else (0, 0)


def promised(ledger: Ledger, model: str, only: Sequence[str] = ()) -> list[Request]:
    """Requests that were carried out, or guarded, at a model, or forgotten by their memories.

    Raises:
        DataError: There are none.
    """
    found = requests_of(ledger.events())
    kept = [
        one
        for one in found.values()
        if model in one.progress
        and (_stands(one, model) or any(memory.forgot for memory in one.remembered.values()))
        and (not only or one.id in only)
    ]
    if not kept:
        raise DataError(
            f"no request was carried out at {model}.",
            where=str(ledger.path),
            hint="'delible request list' tells which models the requests are about.",
        )
    return kept


def _stands(request: Request, model: str) -> bool:
    return request.progress[model].state in ("applied", "guarded")


def check(
    ledger: Ledger,
    model: str,
    system: Any,
    *,
    only: Sequence[str] = (),
    audit: Callable[..., Any] | None = None,
    show: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[Looked]:
    """Asks a system about every request that was carried out, or guarded, at a model.

    Args:
        model: As the requests name it.
        system: What is asked; an open system.
        only: Ids of the only requests to ask about.
        audit: Attacks it, too: called with the system and a request, as
            :func:`delible.audit.audit`.
        show: Messages may tell what was forgotten.

    Raises:
        DataError: Nothing was carried out at such a model.
    """
    looked = []
    for request in promised(ledger, model, only):
        looked += _memories(ledger, request)
        if not _stands(request, model):
            continue
        say(f"Asking about request {request.id} …")
        one = _look(ledger, request, request.progress[model], system, audit, show)
        body = {
            "system": str(system.name), "fingerprint": system.fingerprint, "outcome": one.outcome,
            "numbers": None if one.numbers is None else dict(one.numbers),
            "audit": None if one.audit is None else dict(one.audit),
            "identity": identity_of(system), "unasked": one.unasked,
        }  # fmt: skip
        ledger.append(Draft("checked", request.id, model, body))
        looked.append(one)
    return looked


def _memories(ledger: Ledger, request: Request) -> list[Looked]:
    texts, looked = texts_of(ledger.texts(request.id).get(request.id, {})), []
    for place, one in request.remembered.items():
        if one.forgot is not None:
            body = look_again(ledger, request, place, texts)
            looked.append(Looked(request.id, body["outcome"], in_words(body)))
    return looked


def _look(
    ledger: Ledger, request: Request, progress: Progress, system: Any,
    audit: Callable[..., Any] | None, show: bool,
) -> Looked:  # fmt: skip
    texts = texts_of(ledger.texts(request.id).get(request.id, {}))
    if texts is None:
        return Looked(request.id, "not asked", "its texts are gone")
    records = texts.records or _rows_of_run(ledger, progress)
    if not records:
        return Looked(request.id, "not asked", "it holds names alone, and no question")
    secrets = secrets_of(texts)
    asked = ForgetRequest(forget=tuple(records), subjects=texts.subjects)
    try:
        with discreet(secrets, show=show):
            now = numbers_now(probabilities(system, asked))
            if now is None:
                return Looked(request.id, "not asked", "none of its records can be asked about")
            found, told = compared(progress.applied.body if progress.applied else {}, now)
            tested = None if audit is None else _tested(audit(system, asked), secrets)
    except Exception as error:  # of one request: the others are looked at, and nothing is told
        kind = type(error).__name__
        words = str(error) if isinstance(error, DelibleError) else f"{kind}: {error}"
        return Looked(request.id, "not asked", words if show else redacted(words, secrets))
    if tested is not None and tested["verdict"] in _broken(progress):
        told = f"the audit's verdict is {tested['verdict']} ({told})"
        found = "leaks"
    unasked = len(records) - now["rows"]
    if unasked:
        told += f"; {unasked} of {len(records)} records were not asked about, or not answered"
    if tested is not None and tested["verdict"] == "undetermined":
        told += "; the audit could not decide"
    return Looked(request.id, found, told, now, tested, unasked)


def _broken(progress: Progress) -> tuple[str, ...]:
    """Verdicts that break what was promised; of a guard nobody expects that weights forget."""
    kind = progress.applied.body["artefact"]["kind"] if progress.applied else "guard"
    return ("incomplete",) if kind == "guard" else ("incomplete", "suppression")


def numbers_now(measured: Measured) -> dict[str, Any] | None:
    """The forget answers of one system, in the form in which a run's are written down."""
    change = compare(measured, measured).get("forget")
    return None if change is None else change_numbers(change)


def _rows_of_run(ledger: Ledger, progress: Progress) -> Sequence[RecordBase]:
    """Rows that a run asked the model for, where a request names names alone."""
    if progress.applied is None:
        return ()
    path = ledger.path.parent / progress.applied.body["run"] / "data" / "forget.jsonl"
    if not path.exists():
        return ()
    from delible.loaders import read_records

    return read_records(path)


def _tested(result: Any, secrets: Sequence[str]) -> dict[str, Any]:
    """What an audit tested, as the ledger writes it down: no question, no answer."""
    return {
        "verdict": result.verdict.label if result.verdict else "undetermined",
        "depth": result.depth,
        "attacks": [
            {
                "attack": leak.attack, "title": leak.title, "variant": leak.variant,
                "records": leak.records,
                "erased": {
                    measure: None if value is None else f"{value:.4g}"
                    for measure, value in leak.erased.items()
                },
            }
            for leak in result.leaks
        ],
        "not_tested": [redacted(one, secrets) for one in result.not_tested],
    }  # fmt: skip
