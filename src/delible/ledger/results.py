"""The chain of results at a model: where the next run starts, and how much was lost so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from delible.achieved import Achieved
from delible.errors import RunError
from delible.ledger.evidence import run_facts
from delible.ledger.requests import Request
from delible.ledger.store import Ledger


def chain_end(ledger: Ledger, everyone: Mapping[str, Request], model: str) -> str:
    """What the next run starts from: the last run that was taken, or the model itself.

    Raises:
        RunError: The last result is missing, or is not what it was.
    """
    last = last_applied(everyone, model)
    if last is None:
        return model
    folder = ledger.path.parent / last.body["run"]
    found = run_facts(folder)["files"] if folder.is_dir() else None
    if found != last.body["files"]:
        problem = "is missing" if found is None else "was changed"
        raise RunError(
            f"the result of the last request {problem}.",
            where=str(folder),
            hint="Put it back: the next request goes on from it.",
        )
    return str(folder)


def last_applied(everyone: Mapping[str, Request], model: str) -> Any:
    """The event of the last run whose result was taken at a model; None: there is none."""
    events = [
        event
        for one in everyone.values()
        for event in one.history
        if event.kind == "applied" and event.model == model and "same_as" not in event.body
    ]
    return max(events, key=lambda event: event.sequence, default=None)


def kept_so_far(everyone: Mapping[str, Request], model: str) -> float:
    """The product of the shares that the runs of a chain kept, in [0, 1]."""
    shares = [
        float(event.body["kept"])
        for one in everyone.values()
        for event in one.history
        if event.kind == "applied" and event.model == model and "same_as" not in event.body
        and event.body.get("kept") is not None
    ]  # fmt: skip
    return math.prod(min(1.0, share) for share in shares)


def kept_by(achieved: Achieved | None) -> float | None:
    """The smallest share that a run left of what is kept; None: nothing was measured."""
    changes = {} if achieved is None else achieved.changes
    shares = [
        one.kept for name, one in changes.items() if name != "forget" and math.isfinite(one.kept)
    ]
    return min(shares, default=None)
