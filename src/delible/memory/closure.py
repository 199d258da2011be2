"""What goes with what is forgotten: equal texts, and everything that was made from it.

named ─┬─ the same text ──┬─ made from any of these, and so on: descendants
       └─ again and again └─ and the same text as one of them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from delible.errors import DataError
from delible.memory.database import Tables
from delible.memory.items import Item, near, strings
from delible.names import Names, fold

Descendants = Literal["delete", "quarantine", "rebuild"]


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
    subject: str | None = None,
    text: str | None = None,
) -> dict[int, str]:
    """Places of what a request names, and why.

    Args:
        tables: Within a transaction.
        ids: Ids of items.
        subject: A name: items about it, and items that hold it, in any spelling.
        text: A text: items that hold it, whatever its case and spaces.

    Raises:
        DataError: Something that is named is not there.
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
    if subject is not None:
        found |= _about(tables, subject)
    if text is not None:
        found |= _holding(tables, text)
    if not found:
        what = subject if subject is not None else text if text is not None else None
        raise DataError(
            "nothing is named." if what is None else f"nothing matches '{what}'.",
            where="memory",
            hint="Nothing is forgotten. Search for it first, or name it by its id.",
        )
    return found


def _about(tables: Tables, subject: str) -> dict[int, str]:
    whole = fold(subject).letters
    if not whole:
        raise DataError(f"'{subject}' is no name.", where="memory", hint="Name a subject.")
    names = Names([subject])
    found = {}
    for seq, key, text, about, data, source in tables.texts():
        if fold(about).letters == whole:
            found[seq] = f"about {subject}"
        elif any(names.occur(one) for one in (text, key, about, data, source) if one):
            found[seq] = f"names {subject}"
    return found


def _holding(tables: Tables, text: str) -> dict[int, str]:
    whole = near(text)
    if not whole:
        raise DataError("the text says nothing.", where="memory", hint="Give a text to look for.")
    return {
        seq: "holds the text"
        for seq, key, said, _, data, _ in tables.texts()
        if any(whole in near(one) for one in (key, said, *strings(json.loads(data))) if one)
    }


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


__all__ = ["Closure", "Descendants", "Member", "closure", "named"]
