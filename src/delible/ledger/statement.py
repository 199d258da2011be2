"""The certificate of one request at one model: what was asked, done, tested and not tested.

An in-toto statement (v1). Its subjects are the request, by the hash of its event, and the files of
the artefact; the predicate says the rest. It holds no forgotten text, and its verdict claims no
more than was seen: that something is *removed* is never said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import delible
from delible.errors import DataError, RunError
from delible.ledger.chain import Event, canonical
from delible.ledger.evidence import file_hashes
from delible.ledger.export import head_of
from delible.ledger.guarding import CHANGES_WEIGHTS
from delible.ledger.progress import Progress, Remembered
from delible.ledger.requests import Request

TYPE = "https://in-toto.io/Statement/v1"
PREDICATE = "https://github.com/delible/delible/blob/main/docs/ledger.md#certificate-v1"
NEVER = (
    "That nothing was found by these questions does not show that nothing is left.",
    "Copies elsewhere were not looked at: data sets, logs, caches, backups, models made from this "
    "one.",
)


def statement(events: list[Event], request: Request, model: str, *, made: str) -> dict[str, Any]:
    """The statement about a request at a model.

    Args:
        made: The time, as the clock says it.

    Raises:
        DataError: Nothing was done there that could be certified.
    """
    progress = request.progress.get(model)
    if progress is None:
        raise DataError(f"request {request.id} is not about {model}.")
    memories = {name: one.forgot for name, one in request.remembered.items() if one.forgot}
    if progress.applied is None and not progress.guards and not memories:
        raise DataError(
            f"request {request.id} was not carried out at {model} (it is {progress.state}).",
            hint=f"Run: delible request apply {model}",
        )
    label, words = _verdict(progress, request)
    asked = request.asked
    done = _done(progress, request, model)
    subjects = [{"name": f"request {request.id}", "digest": {"sha256": asked.hash}}]
    subjects += [
        {"name": f"{done['run']}/{name}", "digest": {"sha256": digest}}
        for name, digest in done.get("files", {}).items()
    ]
    return {
        "_type": TYPE,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "made": made,
            "by": f"delible {delible.__version__}",
            "ledger": head_of(events),
            "request": {
                "id": request.id, "event": asked.sequence, "hash": asked.hash,
                "entered": asked.time, "date": request.date.isoformat(),
                "deadline": request.deadline.isoformat(), "basis": request.basis,
                "asker": request.asker, "models": list(request.models),
                "guards": list(request.guards), "memories": list(request.memories),
                "texts": dict(asked.body.get("texts", {})), "texts_erased": request.erased,
            },
            "model": model,
            "done": done,
            "tested": _tested(progress),
            "memories": [_memory(name, one) for name, one in request.remembered.items()],
            "not_tested": _not_tested(progress, request, model),
            "verdict": {"label": label, "words": words},
            "events": [
                {"sequence": one.sequence, "hash": one.hash, "kind": one.kind, "time": one.time}
                for one in request.history
                if one.model in (None, model)
            ],
        },
    }  # fmt: skip


def _done(progress: Progress, request: Request, model: str) -> dict[str, Any]:
    applied = progress.applied
    guard = {"guarded": bool(progress.guards)}
    if applied is None:
        kind = "guard" if progress.guards else "memories"
        return {"kind": kind, "weights_changed": False, **guard}
    body = applied.body
    started = progress.started
    return {
        "kind": body["artefact"]["kind"],
        "weights_changed": body["artefact"]["kind"] in CHANGES_WEIGHTS,
        "method": body["method"], "run": body["run"], "artefact": body["artefact"],
        "files": body["files"], "manifest": body["manifest"],
        "started": started.time if started else None, "ended": applied.time,
        "same_as": body.get("same_as"), **guard,
    }  # fmt: skip


def _memory(name: str, one: Remembered) -> dict[str, Any]:
    """What a memory forgot, and what was seen of it since."""
    told: dict[str, Any] = {"memory": name, "state": one.word}
    for key, event in (("forgot", one.forgot), ("searched", one.searched)):
        body = {} if event is None else {"when": event.time, **event.body}
        told[key] = {part: value for part, value in body.items() if part != "memory"} or None
    return told


def _tested(progress: Progress) -> list[dict[str, Any]]:
    """What was asked when it was carried out, and at the last look since."""
    found = []
    if progress.applied is not None and progress.applied.body["achieved"] is not None:
        found.append(
            {
                "when": progress.applied.time,
                "what": "plain questions before and after",
                "numbers": progress.applied.body["achieved"],
            }
        )
    if progress.checked is not None:
        body = progress.checked.body
        found.append(
            {
                "when": progress.checked.time, "what": "looked again", "system": body["system"],
                "fingerprint": body["fingerprint"], "outcome": body["outcome"],
                "numbers": body["numbers"], "audit": body["audit"],
            }
        )  # fmt: skip
    return found


def _not_tested(progress: Progress, request: Request, model: str) -> list[str]:
    found = []
    checked = progress.checked.body if progress.checked else None
    audit = checked["audit"] if checked else None
    if progress.applied is None or progress.applied.body["achieved"] is None or (
        "forget" not in progress.applied.body["achieved"]
    ):  # fmt: skip
        found.append("The answers before it were not measured.")
    if checked is None or checked["outcome"] == "not asked":
        found.append("The system was not asked again after it was carried out.")
    if audit is None:
        found.append("Nothing was attacked: no prompts that try, no relearning, no quantization.")
    else:
        found += audit["not_tested"]
    others = [name for name in request.models if name != model]
    if others:
        found.append(
            f"Other models of the request have certificates of their own: {_list(others)}."
        )
    for name, one in request.remembered.items():
        if one.forgot is None:
            found.append(f"Nothing was deleted in the memory {name}.")
            continue
        if one.searched is None:
            found.append(f"The memory {name} was not searched again after it forgot.")
        last = one.searched if one.searched and "not_shown" in one.searched.body else one.forgot
        found += [f"Memory {name}: {told}" for told in last.body["not_shown"]]
    if not progress.guards and request.guards:
        found.append(f"No guard goes by it now in: {_list(request.guards)}.")
    return [*found, *NEVER]


def _list(names: Any) -> str:
    return ", ".join(names)


def _verdict(progress: Progress, request: Request) -> tuple[str, str]:
    """One word and one sentence, by what was seen last."""
    checked = progress.checked.body if progress.checked else None
    audit = checked["audit"] if checked else None
    if checked is not None and checked["outcome"] == "leaks":
        return "leaks", f"It is said again by {checked['system']}."
    if back := [name for name, one in request.remembered.items() if one.back]:
        return "leaks", f"It is there again in: {_list(back)}."
    if audit is not None:
        sentences = {
            "incomplete": "Asked plainly, it is still said.",
            "suppression": "It is not said, and an attack or taking a part away brings it out.",
            "removal-consistent": "Questions and the attacks above found nothing of it.",
            "destructive": "It is not said, and what was to be kept is damaged.",
            "undetermined": "The audit could not decide.",
        }
        return str(audit["verdict"]), sentences.get(
            str(audit["verdict"]), "The audit said no more."
        )
    if progress.applied is None and not progress.guards:
        return "memories only", "Memories of it forgot; the model itself is unchanged."
    if progress.applied is None:
        return "guarded", (
            "A guard holds its names back where it stands; the model itself is unchanged."
        )
    forget = (progress.applied.body["achieved"] or {}).get("forget")
    if forget is None:
        return "untested", "It was carried out, and nothing was asked about it."
    said = forget.get("said")
    words = (
        f"Asked plainly, the right answers went from a probability of {forget['before']} to "
        f"{forget['after']}"
    )
    if forget["texts_only"]:
        words = "Asked plainly"
    if said:
        words += f"; {said['after']} of {said['rows']} answers are said ({said['before']} before)"
    state = progress.applied.body["achieved"]["state"]
    told = {
        "part": " Only a part was forgotten.",
        "unknown": " There was little to forget: the model hardly knew it.",
        "too much": " What was to be kept lost more than it should.",
    }
    again = {
        "holds": " At the last look it was not said again.",
        "as before": " At the last look as much of it was said.",
    }
    later = again.get(checked["outcome"], "") if checked is not None else ""
    return "asked plainly only", f"{words}.{told.get(state, '')}{later}"


def payload(content: Mapping[str, Any]) -> bytes:
    """The bytes of a statement that are signed."""
    return canonical(content)


def check_statement(content: Any, where: str) -> dict[str, Any]:
    """A statement that has the form of a certificate.

    Raises:
        RunError: It has not.
    """
    wanted = ("request", "ledger", "model", "done", "tested", "not_tested", "verdict", "events")
    if not isinstance(content, dict) or content.get("_type") != TYPE:
        raise RunError("it holds no in-toto statement (v1).", where=where)
    if content.get("predicateType") != PREDICATE:
        raise RunError("it is a statement about something else.", where=where)
    predicate = content.get("predicate")
    missing = [name for name in wanted if name not in (predicate or {})]
    if missing or not content.get("subject"):
        raise RunError(f"the certificate lacks '{(missing or ['subject'])[0]}'.", where=where)
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


def check_events(content: Mapping[str, Any], events: list[Event], where: str) -> None:
    """Whether a ledger has the events that a certificate names, at their places.

    Raises:
        RunError: It has not.
    """
    by_place = {one.sequence: one.hash for one in events}
    predicate = content["predicate"]
    for one in predicate["events"]:
        if by_place.get(one["sequence"]) != one["hash"]:
            raise RunError(
                f"event {one['sequence']} of the ledger is not the one of the certificate.",
                where=where,
            )
    size = int(predicate["ledger"]["size"])
    if head_of(events[:size]) != predicate["ledger"]:
        raise RunError("the ledger's root is not the one of the certificate.", where=where)
