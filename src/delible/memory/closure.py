"""What goes with what is forgotten: equal texts, and everything that was made from it.

named ─┬─ the same text ──┬─ made from any of these, and so on: descendants
       └─ again and again └─ and the same text as one of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from delible.errors import DataError
from delible.memory.database import Tables
from delible.memory.items import Item, near, strings
from delible.names import Names, fold

Descendants = Literal["delete", "quarantine", "rebuild"]


class NoMatchError(DataError):
    """Nothing is, or says, what is named."""


@dataclass(frozen=True)
class Member:
    """An item that is forgotten, or that was made from one.

    Attributes:
        root: It goes whatever is done with descendants: it was named, or says the same.
        why: In words.
    """

    item: Item
    root: bool
    why: str


@dataclass(frozen=True)
class Closure:
    """Everything that one request to forget concerns, by place and in order of places.

    A place is behind those of its parents.
    """

    members: Mapping[int, Member]

    def __len__(self) -> int:
        return len(self.members)

    def roots(self) -> list[int]:
        return [seq for seq, one in self.members.items() if one.root]


def named(
    tables: Tables,
    ids: Iterable[str] = (),
    subject: str | Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
) -> dict[int, str]:
    """Places of what a request names, and why.

    Args:
        tables: Within a transaction.
        ids: Ids of items.
        subject: A name, or several: items about it, and items that hold it, in any spelling.
        text: A text, or several: items that hold it, whatever its case and spaces.

    Raises:
        DataError: An id is not there, or a name or text says nothing.
        NoMatchError: No item is, or says, any of it.
    """
    wanted = list(dict.fromkeys(ids))
    places = tables.places(wanted, active=False)
    lost = [one for one in wanted if one not in places]
    if lost:
        raise DataError(
            f"no item has the id '{lost[0]}'" + f" (nor {len(lost) - 1} more)" * (len(lost) > 1)
            + ": nothing is forgotten.",
            where="memory",
            hint="See the ids with: delible memory list FOLDER",
        )  # fmt: skip
    found = dict.fromkeys(places.values(), "named by its id")
    names, said = _several(subject), _several(text)
    if names:
        found |= _about(tables, names)
    if said:
        found |= _holding(tables, said)
    if not found:
        what = "', '".join((*names, *said))
        raise NoMatchError(
            f"nothing matches '{what}'." if what else "nothing is named.",
            where="memory",
            hint="Nothing is forgotten. Search for it first, or name it by its id.",
        )
    return found


def holding_whole(tables: Tables, texts: Sequence[str]) -> int:
    """Items in which one of some texts stands, not as a part of a longer word."""
    forms = [re.escape(form) for one in texts if (form := near(one))]
    if not forms:
        return 0
    wanted, count = re.compile(rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)"), 0
    for _, key, text, about, data, source in tables.texts():
        parts = (key, text, about, source, *strings(json.loads(data)))
        count += any(wanted.search(near(one)) for one in parts if one)
    return count


def _several(named: str | Sequence[str] | None) -> tuple[str, ...]:
    return (named,) if isinstance(named, str) else tuple(dict.fromkeys(named or ()))


def _about(tables: Tables, subjects: Sequence[str]) -> dict[int, str]:
    whole = {fold(one).letters: one for one in subjects}
    if "" in whole:
        raise DataError(f"'{whole['']}' is no name.", where="memory", hint="Name a subject.")
    names, found = Names(subjects), {}
    for seq, key, text, about, data, source in tables.texts():
        if (subject := whole.get(fold(about).letters)) is not None:
            found[seq] = f"about {subject}"
        elif any(names.occur(one) for one in (text, key, about, data, source) if one):
            found[seq] = f"names {subjects[0]}" if len(subjects) == 1 else "names one of them"
    return found


def _holding(tables: Tables, texts: Sequence[str]) -> dict[int, str]:
    whole = [near(one) for one in texts]
    if not all(whole):
        raise DataError("the text says nothing.", where="memory", hint="Give a text to look for.")
    found = {}
    for seq, key, text, about, data, source in tables.texts():
        parts = (key, text, about, source, *strings(json.loads(data)))
        said = [near(one) for one in parts if one]
        if any(one in other for one in whole for other in said):
            found[seq] = "holds the text"
    return found


def closure(tables: Tables, start: Mapping[int, str]) -> Closure:
    """What goes with some places, from the one before to the next until nothing is new."""
    roots = _spread(tables, dict(start), descend=False)
    rest = _spread(tables, dict(roots), descend=True)
    items = tables.items(sorted(rest))
    return Closure({seq: Member(item, seq in roots, rest[seq]) for seq, item in items.items()})


def _spread(tables: Tables, found: dict[int, str], *, descend: bool) -> dict[int, str]:
    waiting, roots = list(found), set(found) if descend else None
    while waiting:
        seq = waiting.pop()
        id_, key, text = tables.database.execute(
            "SELECT id, key_form, text_form FROM items WHERE seq = ?", (seq,)
        ).fetchone()
        whole = roots is None or seq in roots  # what was made from it shares no more than its text
        forms = (key, text) if whole else (text, text)
        new = {
            other: f"says the same as {id_}"
            for (other,) in tables.database.execute(
                "SELECT seq FROM items WHERE key_form IN (?, ?) UNION "
                "SELECT seq FROM items WHERE text_form IN (?, ?)",
                (*forms, *forms),
            )
        }
        if descend:
            new |= {
                child: f"made from {id_}"
                for (child,) in tables.database.execute(
                    "SELECT child FROM derived WHERE parent = ?", (seq,)
                )
            }
        for other, why in new.items():
            if other not in found:
                found[other] = why
                waiting.append(other)
    return found


__all__ = [
    "Closure", "Descendants", "Member", "NoMatchError", "closure", "holding_whole", "named",
]  # fmt: skip
