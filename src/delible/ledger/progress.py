"""How far a request is at one model, and in one memory: read off the events about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delible.ledger.chain import Event

State = Literal["open", "guarded", "applied", "failed", "held", "withdrawn"]


@dataclass
class Progress:
    """How far a request is at one model.

    Attributes:
        applied: The event of the run that carried it out.
        started: The event of the run that was begun last.
        guards: Files of targets in which its entry stands now.
        entries: Files in which it may stand: a kill can come before the event that says so.
        final: A guard is all that the policy wants.
        looks: The last event of each system that was looked at since it was carried out, the last
            one last.
        certified: The last certificate.
    """

    state: State = "open"
    applied: Event | None = None
    started: Event | None = None
    guards: tuple[str, ...] = ()
    entries: frozenset[str] = frozenset()
    final: bool = False
    looks: tuple[Event, ...] = ()
    certified: Event | None = None

    @property
    def checked(self) -> Event | None:
        """The last look at which a system was asked, or else the last one; None: nobody looked."""
        asked = [one for one in self.looks if one.body["outcome"] != "not asked"]
        return next(reversed(asked or self.looks), None)

    @property
    def leaks(self) -> bool:
        """The last look found that it is said again."""
        return self.checked is not None and self.checked.body["outcome"] == "leaks"

    @property
    def word(self) -> str:
        """The state, with what was seen since."""
        return f"{self.state}, leaks" if self.leaks else self.state


@dataclass
class Remembered:
    """How far a request is in one memory.

    Attributes:
        begun: The event before the deletion.
        forgot: The last event of a deletion, or of a search that found nothing to delete.
        failed: The event of a deletion that could not be done, if nothing came after it.
        searched: The last look since.
    """

    begun: Event | None = None
    forgot: Event | None = None
    failed: Event | None = None
    searched: Event | None = None

    @property
    def back(self) -> bool:
        """The last look found it there again."""
        return self.searched is not None and self.searched.body["outcome"] == "leaks"

    @property
    def left(self) -> bool:
        """Something is to be done."""
        return self.forgot is None or self.back

    @property
    def word(self) -> str:
        """How far it is."""
        if self.failed is not None:
            return "failed"
        return "open" if self.forgot is None else "it is back" if self.back else "forgotten"


def moved(progress: Progress, event: Event) -> None:
    """Takes in what happened at its model."""
    match event.kind:
        case "started":
            progress.started = event
        case "applied":
            progress.state, progress.applied = "applied", event
            progress.looks = ()  # what was looked at then was without it
        case "failed" | "held":
            progress.state = "guarded" if progress.guards else event.kind  # type: ignore[assignment]
        case "guarding":
            progress.entries |= {event.body["targets"]}
        case "guarded":
            path = event.body["targets"]
            progress.guards = tuple(dict.fromkeys((*progress.guards, path)))
            progress.entries |= {path}
            progress.final = bool(event.body.get("final"))
            progress.state = "applied" if progress.applied else "guarded"
        case "unguarded":
            path = event.body["targets"]
            progress.guards = tuple(one for one in progress.guards if one != path)
            progress.entries -= {path}
            if progress.applied is None:
                progress.looks = ()  # it was seen behind the guard
            if not progress.guards:
                progress.final = False
                progress.state = "applied" if progress.applied else "open"
        case "checked":
            progress.looks = _looked(progress.looks, event)
        case "certified":
            progress.certified = event


def _looked(looks: tuple[Event, ...], event: Event) -> tuple[Event, ...]:
    """Looks with one more; that nothing could be asked does not undo what was seen."""
    system, asked = event.body.get("system"), event.body["outcome"] != "not asked"
    kept = (
        one
        for one in looks
        if one.body.get("system") != system or not (asked or one.body["outcome"] == "not asked")
    )
    return (*kept, event)


def remembered(memory: Remembered, event: Event) -> None:
    """Takes in what happened in its memory."""
    match event.kind:
        case "forgetting":
            memory.begun = event
        case "forgot":
            memory.forgot, memory.failed, memory.searched = event, None, None
        case "not forgotten":
            memory.failed = event
        case "searched":
            memory.searched = event
