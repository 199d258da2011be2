"""What the events say about each request: the ledger's state is read off them, and nowhere kept.

A request is at every model of its scope on its own: *open*, *guarded* (its names are in the file
of targets, the weights have not changed), *applied*, *failed* (it is tried again next time), *held*
(a person must decide), *withdrawn*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from delible.errors import DataError, nearest
from delible.ledger.chain import Event
from delible.ledger.form import Day, Wanted
from delible.ledger.progress import Progress, Remembered, moved, remembered
from delible.ledger.store import Draft, Ledger
from delible.ledger.texts import PrivateText
from delible.loaders.requests import Holds
from delible.names import fold
from delible.records import ForgetRequest, Record, to_json_line

#: Warned about when the deadline is so many days away, or fewer.
SOON = 7

_record: TypeAdapter[Record] = TypeAdapter(Record)


@dataclass
class Request:
    """A request as the ledger has it.

    Attributes:
        marks: Keyed hashes of its facts.
        about: Keyed hashes of its names, those of its records among them.
        named: Keyed hashes of the names that it asks for as such; None: an older delible did not
            tell them from the others.
        asker: Keyed hash of who asked.
        progress: By model.
        remembered: By memory.
        history: Its events.
        erased: Why its texts are gone.
    """

    id: str
    asked: Event
    date: Day
    deadline: Day
    basis: str
    asker: str | None
    models: list[str]
    guards: tuple[str, ...]
    memories: tuple[str, ...]
    keep_until: Day | None
    marks: frozenset[str]
    about: frozenset[str]
    named: frozenset[str] | None
    progress: dict[str, Progress] = field(default_factory=dict)
    remembered: dict[str, Remembered] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)
    erased: str | None = None
    withdrawn: bool = False

    @property
    def size(self) -> int:
        """Records and names that it holds."""
        fields = self.asked.body.get("texts", {})
        return sum(name.startswith(("records.", "subjects.")) for name in fields)

    @property
    def open(self) -> bool:
        """Something is left to do at some model, or in a memory."""
        return self.memories_left or any(
            one.state not in ("applied", "withdrawn") and not one.final
            for one in self.progress.values()
        )

    @property
    def memories_left(self) -> bool:
        """Something is left to do in a memory."""
        return not self.withdrawn and any(one.left for one in self.remembered.values())

    def days_left(self, today: Day) -> int:
        """Days until the deadline; negative: it has passed."""
        return (self.deadline - today).days

    def urgency(self, today: Day) -> str:
        """A word where its deadline is near or over and something is left to do."""
        left = self.days_left(today)
        if not self.open or left > SOON:
            return ""
        if left < 0:
            return f"{-left} days late" if left < -1 else "1 day late"
        return "due today" if left == 0 else f"{left} days left" if left > 1 else "1 day left"


def requests_of(events: Iterable[Event]) -> dict[str, Request]:
    """Every request by its id, in the order in which they came."""
    found: dict[str, Request] = {}
    for event in events:
        if event.kind == "requested":
            request = _new(event)
            found[request.id] = request
        if event.request is None:
            continue
        request = found[event.request]
        request.history.append(event)
        progress = request.progress.get(event.model) if event.model else None
        if progress is not None:
            moved(progress, event)
        elif event.body.get("memory") in request.remembered:
            remembered(request.remembered[event.body["memory"]], event)
        match event.kind:
            case "scoped":
                request.models += event.body["models"]
                request.progress |= {name: Progress() for name in event.body["models"]}
            case "withdrawn":
                request.withdrawn = True
                for one in request.progress.values():
                    one.state = "applied" if one.applied else "withdrawn"
        if event.kind in ("withdrawn", "erased"):
            request.erased = event.kind
    return found


def _new(event: Event) -> Request:
    body = event.body
    until = body.get("keep_until")
    return Request(
        str(event.request), event, Day.fromisoformat(body["date"]),
        Day.fromisoformat(body["deadline"]), body["basis"], body.get("asker"),
        list(body["models"]), tuple(body["guards"]), tuple(body["memories"]),
        Day.fromisoformat(until) if until else None, frozenset(body["marks"]),
        frozenset(body["about"]), frozenset(body["named"]) if "named" in body else None,
        {name: Progress() for name in body["models"]},
        {name: Remembered() for name in body["memories"]},
    )  # fmt: skip


def named(found: Mapping[str, Request], name: str) -> Request:
    """The request with an id.

    Raises:
        DataError: There is none.
    """
    if name not in found:
        hint = nearest(name, found) if found else "'delible request add' adds one."
        raise DataError(f"there is no request '{name}'.", hint=hint)
    return found[name]


# ---- adding


@dataclass(frozen=True)
class Overlap:
    """What a new request shares with an earlier one.

    Attributes:
        kind: ``same``: all that it holds was asked for before; ``part``: some; ``names``: other
            records about the same names.
    """

    request: str
    earlier: str
    kind: Literal["same", "part", "names"]
    shared: int

    def __str__(self) -> str:
        words = {
            "same": "holds nothing that was not asked for in",
            "part": f"shares {self.shared} records or names with",
            "names": "is about names of",
        }
        return f"{self.request} {words[self.kind]} {self.earlier}"


def overlaps(new: Request, earlier: Iterable[Request]) -> list[Overlap]:
    """What a request shares with earlier ones that were not withdrawn."""
    found = []
    for one in earlier:
        facts, names = new.marks & one.marks, new.about & one.about
        if one.withdrawn or not (facts or names):
            continue
        if covers(one, new):
            kind: Literal["same", "part", "names"] = "same"
        else:
            alone = (new.named or frozenset()) & (one.named or frozenset())
            kind = "part" if facts or alone else "names"
        found.append(Overlap(new.id, one.id, kind, len(facts) + len(names)))
    return found


def covers(one: Request, other: Request) -> bool:
    """Whether all that another request holds is in this one."""
    if one.named is None or other.named is None:
        return False
    mine, theirs = (
        Holds(each.marks, each.about, each.named or frozenset()) for each in (one, other)
    )
    return mine.covers(theirs)


def add(ledger: Ledger, wanted: Sequence[Wanted]) -> tuple[list[Request], list[Overlap]]:
    """Adds requests, all of them or none; and what they share with each other and earlier ones.

    Raises:
        DataError: An id is taken.
    """
    marks = [_marks(ledger, one) for one in wanted]  # needs the key: before the writing

    def drafts(events: list[Event]) -> list[Draft]:
        taken = {event.request for event in events if event.kind == "requested"}
        count, made = len(taken), []
        for one, marked in zip(wanted, marks, strict=True):
            name = one.id
            while name is None or (one.id is None and name in taken):
                count += 1
                name = f"r-{count:04d}"
            if name in taken:
                raise DataError(
                    f"there is a request '{name}' already.", hint="Give another id, or none."
                )
            taken.add(name)
            made.append(_draft(name, one, marked))
        return made

    written = ledger.append_if(drafts)
    found = requests_of(ledger.events())
    new = [found[str(event.request)] for event in written]
    shared = []
    for request in new:
        earlier = (one for one in found.values() if one.asked.sequence < request.asked.sequence)
        shared += overlaps(request, earlier)
    return new, shared


def extend(ledger: Ledger, old: str, new: str) -> list[str]:
    """Every request about one model that was not withdrawn becomes one about another, too.

    Returns:
        The ids of those that were not about it before.

    Raises:
        DataError: No request is about the first one.
    """

    def drafts(events: list[Event]) -> list[Draft]:
        here = [one for one in requests_of(events).values() if old in one.models]
        if not here:
            raise DataError(f"no request is about {old}.", where=str(ledger.path))
        return [
            Draft("scoped", one.id, body={"models": [new]})
            for one in here
            if new not in one.models and not one.withdrawn
        ]

    return [str(event.request) for event in ledger.append_if(drafts)]


def _marks(ledger: Ledger, one: Wanted) -> dict[str, Any]:
    holds = Holds.of(one.records, one.subjects)
    facts = {ledger.keyed("fact", text) for text in holds.facts}
    about = {name: ledger.keyed("name", name) for name in holds.names}
    named = {about[name] for name in holds.asked}
    asker = {"asker": ledger.keyed("asker", fold(one.asker).letters)} if one.asker else {}
    return {
        "marks": sorted(facts), "about": sorted(about.values()), "named": sorted(named), **asker,
    }  # fmt: skip


def _draft(name: str, one: Wanted, marked: Mapping[str, Any]) -> Draft:
    body: dict[str, Any] = {
        "date": one.date.isoformat(), "deadline": one.deadline.isoformat(), "basis": one.basis,
        "models": list(one.models), "guards": list(one.guards), "memories": list(one.memories),
        **({"keep_until": one.keep_until.isoformat()} if one.keep_until else {}), **marked,
    }  # fmt: skip
    texts = {f"records.{place}": to_json_line(record) for place, record in enumerate(one.records)}
    texts |= {f"subjects.{place}": subject for place, subject in enumerate(one.subjects)}
    if one.named and one.asker:
        texts["asker"] = one.asker
    return Draft("requested", name, body=body, texts=texts)


# ---- texts


@dataclass(frozen=True)
class Texts:
    """The private texts of a request."""

    records: tuple[Record, ...]
    subjects: tuple[str, ...]
    asker: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names to forget, those of the records among them."""
        about = [one.subject for one in self.records if one.subject]
        return tuple(dict.fromkeys((*self.subjects, *about)))

    def request(self, retain: Sequence[Record] = ()) -> ForgetRequest:
        """As what methods and audits take."""
        return ForgetRequest(forget=self.records, subjects=self.subjects, retain=tuple(retain))


def texts_of(fields: Mapping[str, PrivateText]) -> Texts | None:
    """The texts of a request, from the ledger's; None: they are gone."""

    def all_of(kind: str) -> list[str]:
        places = sorted(int(name.partition(".")[2]) for name in fields if name.startswith(kind))
        return [fields[f"{kind}{place}"].content for place in places]

    records = tuple(_record.validate_json(line) for line in all_of("records."))
    subjects = tuple(all_of("subjects."))
    if not records and not subjects:
        return None
    asker = fields.get("asker")
    return Texts(records, subjects, asker.content if asker else None)
