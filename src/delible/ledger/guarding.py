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
Happened = Literal["applied", "covered", "forgotten", "guarded", "failed", "held"]


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
    progress = request.progress[model]
    paths = [Path(one) for one in request.guards]
    paths = paths or ([policy.guard.targets] if policy.guard.targets else [])
    written = []
    for path in paths if texts is not None and texts.names else ():
        place = {"targets": str(path.absolute())}
        if place["targets"] not in progress.entries:
            ledger.append(Draft("guarding", name, model, place))
        assert texts is not None
        add_entry(path, name, texts)
        written.append(path)
        if place["targets"] not in progress.guards:
            ledger.append(Draft("guarded", name, model, place))
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
    """Takes the entries out where the policy says so and the weights have changed; in words."""
    request = requests_of(ledger.events())[name]
    progress = request.progress[model]
    applied = progress.applied
    if not progress.entries or not policy.guard.remove_when_done or applied is None:
        return ""
    if applied.body["artefact"]["kind"] not in CHANGES_WEIGHTS:
        return ""
    told = []
    for path in sorted(progress.entries):
        if any(path in one.guards and not one.applied for one in request.progress.values()):
            told.append(f"its guard in {path} stays for other models")
        elif drop_guard(ledger, request, path, "applied"):
            told.append(f"its guard in {path} is out")
        else:
            told.append(f"its entry in {path} is the last one there and stays")
    return "".join(f"; {one}" for one in told)


def drop_guard(ledger: Ledger, request: Request, path: str, why: str) -> bool:
    """Takes a request's entry out of one file; False: it is the last one, and stays."""
    if not drop_entry(Path(path), request.id):
        return False
    models = [name for name, one in request.progress.items() if path in one.entries]
    body = {"targets": path, "why": why}
    ledger.append(*(Draft("unguarded", request.id, name, body) for name in models))
    return True


def hold(
    ledger: Ledger, model: str, name: str, reason: str, everyone: Mapping[str, Request]
) -> Done:
    """Leaves a request for a person to decide, and says so once."""
    last = everyone[name].history[-1]
    if last.kind != "held" or last.body.get("reason") != reason:
        ledger.append(Draft("held", name, model, {"reason": reason}))
    return Done(name, "held", reason)
