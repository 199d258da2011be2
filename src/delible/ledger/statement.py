"""The certificate of one request at one model: what was asked, done, tested and not tested.

An in-toto statement (v1). Its subjects are the request, by the hash of its event, and the files of
the artefact; the predicate says the rest. It holds no forgotten text, and its verdict claims no
more than was seen: that something is *removed* is never said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import delible
from delible.errors import DataError
from delible.ledger.chain import Event, canonical
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


def statement(
    events: list[Event], request: Request, model: str, *, made: str, there: bool = True
) -> dict[str, Any]:
    """The statement about a request at a model.

    Args:
        made: The time, as the clock says it.
        there: The files of the artefact were seen now, as they were written.

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
            "not_tested": [
                *([] if there else ["The files of the artefact: they were not there any more."]),
                *_not_tested(progress, request, model),
            ],
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
    """What was asked when it was carried out, and of each system at the last look since."""
    found = []
    if progress.applied is not None and progress.applied.body["achieved"] is not None:
        found.append(
            {
                "when": progress.applied.time,
                "what": "plain questions before and after",
                "numbers": progress.applied.body["achieved"],
            }
        )
    for look in progress.looks:
        body = look.body
        found.append(
            {
                "when": look.time, "what": "looked again", "system": body["system"],
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
    else:
        found += _not_asked(checked, progress)
    if audit is not None:
        found += audit["not_tested"]
    elif any(one.body["audit"] for one in progress.looks):
        found.append("At the last look nothing was attacked.")
    else:
        found.append("Nothing was attacked: no prompts that try, no relearning, no quantization.")
    if progress.guards:
        found.append("Whether a guard that goes by its entry stands before the model.")
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


def _not_asked(checked: Mapping[str, Any], progress: Progress) -> Iterator[str]:
    """What the last look leaves open."""
    system, unasked = checked["system"], checked.get("unasked")
    if unasked:
        yield f"{unasked} of its records: {system} was not asked about them, or did not answer."
    made = progress.applied.body["artefact"]["identity"] if progress.applied else None
    if progress.applied and (made is None or checked.get("identity") != made):
        yield f"Whether {system} was made from the artefact above."


def _list(names: Any) -> str:
    return ", ".join(names)


def _verdict(progress: Progress, request: Request) -> tuple[str, str]:
    """One word and one sentence, by what was seen last."""
    checked = progress.checked.body if progress.checked else None
    audit = checked["audit"] if checked else None
    if checked is not None and checked["outcome"] == "leaks":
        hidden = audit is not None and audit["verdict"] == "suppression"
        how = "Asked or attacked, it is said again by" if hidden else "It is said again by"
        return "leaks", f"{how} {checked['system']}."
    if back := [name for name, one in request.remembered.items() if one.back]:
        return "leaks", f"It is there again in: {_list(back)}."
    later = _later(progress)
    if audit is not None:
        sentences = {
            "incomplete": "Asked plainly, it is still said.",
            "suppression": "It is not said, and an attack or taking a part away brings it out.",
            "removal-consistent": "Questions and the attacks above found nothing of it.",
            "destructive": "It is not said, and what was to be kept is damaged.",
            "undetermined": "The audit could not decide.",
        }
        label = str(audit["verdict"])
        return label, sentences.get(label, "The audit said no more.") + later
    if progress.applied is None and not progress.guards:
        return "memories only", "Memories of it forgot; the model itself is unchanged."
    if progress.applied is None:
        return "guarded", (
            f"Its names stand where a guard goes by them; the model itself is unchanged.{later}"
        )
    forget = (progress.applied.body["achieved"] or {}).get("forget")
    if forget is None:
        if later:
            return "asked plainly only", f"It was carried out, and not measured then.{later}"
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
    return "asked plainly only", f"{words}.{told.get(state, '')}{later}"


def _later(progress: Progress) -> str:
    """What the last look showed, of which system, and which others said it at theirs."""
    last = progress.checked
    if last is None or last.body["outcome"] == "not asked":
        return ""
    system = last.body["system"]
    again = {
        "holds": f" At the last look {system} did not say it again.",
        "as before": f" At the last look {system} said as much of it.",
    }
    leaking = [
        one.body["system"]
        for one in progress.looks
        if one.body["outcome"] == "leaks" and one.body["system"] != system
    ]
    also = f" Before, it was said again by {_list(leaking)}." if leaking else ""
    return again.get(last.body["outcome"], "") + also


def payload(content: Mapping[str, Any]) -> bytes:
    """The bytes of a statement that are signed."""
    return canonical(content)
