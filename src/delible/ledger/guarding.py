"""Guards of requests: entries that are written at once, and taken out when weights have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from delible.ledger.policy import Policy
from delible.ledger.requests import Request, Texts, requests_of
from delible.ledger.store import Draft, Ledger
from delible.ledger.targets_file import add_entry, drop_entry

#: Artefacts that change what the weights say; a guard's entry may go when one is there.
CHANGES_WEIGHTS = ("model", "adapter", "patch")
Happened = Literal["applied", "covered", "guarded", "failed", "held"]


@dataclass(frozen=True)
class Done:
    """What became of one request.

    Attributes:
        told: Why, in a sentence.
    """

    request: str
    what: Happened
    told: str = ""


def write_guard(
    ledger: Ledger, model: str, policy: Policy, name: str, texts: Texts | None
) -> list[Path]:
    """Writes a request's entry into the files of targets: the policy's, and those of its scope."""
    request = requests_of(ledger.events())[name]
    paths = [Path(one) for one in request.guards]
    paths = paths or ([policy.guard.targets] if policy.guard.targets else [])
    written = []
    for path in paths:
        if texts is None or not add_entry(path, name, texts):
            continue
        written.append(path)
        if request.progress[model].guard != str(path.absolute()):
            ledger.append(Draft("guarded", name, model, {"targets": str(path.absolute())}))
    return written


def guard_instead(
    ledger: Ledger, model: str, policy: Policy, name: str, texts: Texts, why: str
) -> Done:
    """A guard and no change of weights; where no guard can, a person must decide."""
    if written := write_guard(ledger, model, policy, name, texts):
        if not requests_of(ledger.events())[name].progress[model].final:
            body = {"targets": str(written[-1].absolute()), "final": True}
            ledger.append(Draft("guarded", name, model, body))
        return Done(name, "guarded", why)
    reason = (
        "the policy names no file of targets (guard: {targets: FILE})"
        if texts.names
        else "it names nobody, and guards find targets by names"
    )
    ledger.append(Draft("held", name, model, {"reason": f"no guard: {reason}"}))
    return Done(name, "held", f"{why}, but no guard can: {reason}")


def take_guard_out(ledger: Ledger, model: str, policy: Policy, name: str) -> str:
    """Takes the entry out where the policy says so and the weights have changed."""
    request = requests_of(ledger.events())[name]
    progress = request.progress[model]
    if progress.guard is None or not policy.guard.remove_when_done:
        return ""
    applied = progress.applied
    if applied is None or applied.body["artefact"]["kind"] not in CHANGES_WEIGHTS:
        return ""
    if any(one.guard and not one.applied for one in request.progress.values()):
        return "; its guard stays for other models"
    if not drop_entry(Path(progress.guard), name):
        return "; its guard's entry is the last of its file and stays"
    ledger.append(Draft("unguarded", name, model, {"targets": progress.guard, "why": "applied"}))
    return "; its guard's entry is out"


def hold(
    ledger: Ledger, model: str, name: str, reason: str, everyone: Mapping[str, Request]
) -> Done:
    """Leaves a request for a person to decide, and says so once."""
    last = everyone[name].history[-1]
    if last.kind != "held" or last.body.get("reason") != reason:
        ledger.append(Draft("held", name, model, {"reason": reason}))
    return Done(name, "held", reason)
