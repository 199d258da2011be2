"""A deletion: planned, written down as an intent, carried out, recorded.

The intent holds all that carrying out needs, but no word of what goes: places, new texts of rebuilt
items, and the vectors that fill the holes. Carrying out changes the vectors first and the tables
in the same transaction that clears the intent, so it can be done again from any point at which a
process died, to the same end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from delible.errors import DataError
from delible.memory import learned, steps
from delible.memory.closure import Closure, Descendants
from delible.memory.database import MODULUS, Tables
from delible.memory.items import Item, State, near
from delible.memory.pieces import Sentinel
from delible.memory.scan import Scanned
from delible.memory.vectors import Vectors

#: Makes a descendant anew from what is left of its parents; None: it goes.
Rebuild = Callable[[Item, tuple[Item, ...]], Item | None]
#: A removed text of fewer letters may stand in a rebuilt one by chance.
TELLING = 8


@dataclass
class Change:
    """What a deletion does, by place.

    Attributes:
        roots: Of those that are removed: what was named, or says the same.
        rewritten: Rebuilt items; one that is as before only loses parents.
        slots: Where vectors of items that stay are afterwards, if they move.
        filled: What is written into slots.
        rows: Vectors afterwards.
        shift: What is added to the state.
        vectors_gone: By which removed vectors are looked for.
    """

    removed: list[int] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    quarantined: dict[int, Item] = field(default_factory=dict)
    rewritten: dict[int, Item] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    filled: dict[int, bytes] = field(default_factory=dict)
    rows: int = 0
    shift: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    vectors_gone: list[Sentinel] = field(default_factory=list)


@dataclass(frozen=True)
class Deletion:
    """What was deleted, and what was looked for before and afterwards.

    Attributes:
        record: Counts, hashed ids and states; nothing that was said.
        before: Pieces of what was about to go that were found in files.
        after: What was found of them afterwards; None if nobody looked.
        unknown: Items that went of which no piece can tell whether they are gone.
    """

    record: Mapping[str, Any]
    before: frozenset[Sentinel] | None = None
    after: Scanned | None = None
    unknown: int = 0


def planned(
    tables: Tables,
    vectors: Vectors,
    chosen: Closure,
    descendants: Descendants,
    rebuild: Rebuild | None,
    encode: Callable[[Sequence[str]], Any],
) -> Change:
    """Everything that a deletion will do, worked out before anything is changed.

    Raises:
        DataError: A rebuilt item holds what is removed.
    """
    change = Change(removed=chosen.roots(), roots=chosen.roots())
    gone = set(change.removed)
    others = [seq for seq in chosen.members if seq not in gone]
    if descendants == "delete":
        change.removed = sorted(chosen.members)
    elif descendants == "rebuild":
        assert rebuild is not None
        _rebuild(tables, chosen, others, rebuild, change)
    gone_ids = {chosen.members[seq].item.id for seq in change.removed}
    if descendants == "quarantine":
        change.quarantined = {seq: _without(chosen.members[seq].item, gone_ids) for seq in others}
    _check_rebuilt(chosen, change)
    rows: dict[int, tuple[State, int | None]] = {
        seq: (state, slot)
        for seq, state, slot in tables.database.execute(
            "SELECT seq, state, slot FROM items WHERE seq IN (SELECT value FROM json_each(?))",
            (json.dumps(list(chosen.members)),),
        )
    }
    slots = [slot for _, slot in rows.values() if slot is not None]
    stored = dict(zip(slots, (row.tobytes() for row in vectors.read(slots)), strict=True))
    _compact(tables, vectors, rows, change)
    new = _new_vectors(chosen, rows, change, encode)
    for seq, (state, slot) in rows.items():
        before = chosen.members[seq].item
        old = b"" if slot is None else stored[slot]
        change.shift -= tables.weight(before, state, old)
        if seq in change.quarantined:
            change.shift += tables.weight(change.quarantined[seq], "quarantined", b"")
        if seq in change.rewritten:
            change.shift += tables.weight(change.rewritten[seq], state, new.get(seq, old))
            if seq in new and slot is not None:
                change.filled[change.slots.get(seq, slot)] = new[seq]
        if any(old) and (seq not in change.rewritten or seq in new):
            change.vectors_gone.append(Sentinel("vector", old))
    change.record = _record(tables, chosen, descendants, change)
    return change


def _rebuild(
    tables: Tables, chosen: Closure, others: Sequence[int], rebuild: Rebuild, change: Change
) -> None:
    gone = {chosen.members[seq].item.id for seq in change.removed}
    now: dict[str, Item] = {}
    for seq in others:  # parents come before their children
        item = chosen.members[seq].item
        left = [one for one in item.parents if one not in gone]
        unchanged = [one for one in left if one not in now]
        now |= {
            one.id: one
            for one in tables.items(list(tables.places(unchanged, active=False).values())).values()
        }
        made = rebuild(item, tuple(now[one] for one in left))
        if made is None:
            gone.add(item.id)
            change.removed.append(seq)
            continue
        made = made.model_copy(update={"id": item.id, "parents": tuple(left)})
        now[item.id] = change.rewritten[seq] = Item.model_validate(made.model_dump())
    change.removed.sort()


def _without(item: Item, gone: set[str]) -> Item:
    left = tuple(one for one in item.parents if one not in gone)
    return item.model_copy(update={"parents": left})


def _check_rebuilt(chosen: Closure, change: Change) -> None:
    removed = [chosen.members[seq].item for seq in change.removed]
    gone = {text: one.id for one in removed for text in map(near, (one.text, one.found_by))}
    for item in change.rewritten.values():
        said = [near(one) for one in item.says()]
        for text, id_ in gone.items():
            if any(text == one or (len(text) >= TELLING and text in one) for one in said):
                raise DataError(
                    f"'{item.id}' as it was rebuilt still holds what '{id_}' says.",
                    where="memory",
                    hint="Nothing is changed. Rebuild it without that, or return None.",
                )


def _compact(
    tables: Tables, vectors: Vectors, rows: Mapping[int, tuple[State, int | None]], change: Change
) -> None:
    """The last vectors move into the holes."""
    leaving = [*change.removed, *change.quarantined]
    freed = sorted(slot for seq in leaving if (slot := rows[seq][1]) is not None)
    change.rows = tables.rows - len(freed)
    holes = [slot for slot in freed if slot < change.rows]
    left = set(freed)
    last = [
        (seq, slot)
        for seq, slot in tables.database.execute(
            "SELECT seq, slot FROM items WHERE slot >= ? ORDER BY slot", (change.rows,)
        )
        if slot not in left
    ]
    moved = vectors.read([slot for _, slot in last])
    for hole, (seq, _), row in zip(holes, last, moved, strict=True):
        change.slots[seq], change.filled[hole] = hole, row.tobytes()


def _new_vectors(
    chosen: Closure,
    rows: Mapping[int, tuple[State, int | None]],
    change: Change,
    encode: Callable[[Sequence[str]], Any],
) -> dict[int, bytes]:
    """Vectors of rebuilt items that are found by another text than before."""
    new = [
        seq
        for seq, item in change.rewritten.items()
        if rows[seq][1] is not None and item.found_by != chosen.members[seq].item.found_by
    ]
    found = encode([change.rewritten[seq].found_by for seq in new])
    if found is None and new:
        raise DataError(
            "rebuilt items need the encoder that this memory was made with.",
            where="memory",
            hint="Open the memory with it.",
        )
    return (
        {seq: np.asarray(row).tobytes() for seq, row in zip(new, found, strict=True)} if new else {}
    )


def _record(
    tables: Tables, chosen: Closure, descendants: Descendants, change: Change
) -> dict[str, Any]:
    def told(seqs: Any) -> list[dict[str, str]]:
        return [
            {
                "id": tables.hashed(f"id {chosen.members[seq].item.id}").hex()[:32],
                "kind": chosen.members[seq].item.kind,
                "as": "named, or the same text" if chosen.members[seq].root else "descendant",
            }
            for seq in seqs
        ]

    kinds = Counter(chosen.members[seq].item.kind for seq in change.removed)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "descendants": descendants,
        "removed": told(change.removed),
        "quarantined": told(change.quarantined),
        "rebuilt": told(change.rewritten),
        "removed_by_kind": dict(sorted(kinds.items())),
        "state_before": tables.state,
    }


# ---- changing


def intend(tables: Tables, change: Change) -> None:
    """Writes the intent, in a transaction of its own: from here on the deletion will happen."""
    plan = {
        "removed": change.removed,
        "roots": change.roots,
        "quarantined": list(change.quarantined),
        "rewritten": {seq: one.model_dump(mode="json") for seq, one in change.rewritten.items()},
        "slots": change.slots,
        "rows": change.rows,
        "shift": str(change.shift % MODULUS),
        "record": change.record,
    }
    steps.reached("database: write the intent")
    tables.database.execute("INSERT INTO intents(plan) VALUES(?)", (json.dumps(plan),))
    tables.database.executemany("INSERT INTO intended VALUES(?, ?)", change.filled.items())


def carry_out(tables: Tables, vectors: Vectors) -> None:
    """Does what the intent says, and clears it. To be called again after a crash."""
    database = tables.database
    plan = json.loads(database.execute("SELECT plan FROM intents").fetchone()[0])
    if vectors.size():
        vectors.write(dict(database.execute("SELECT slot, vector FROM intended")))
        vectors.shorten(plan["rows"])
    removed, quarantined, roots = plan["removed"], plan["quarantined"], set(plan["roots"])
    rewritten = {int(seq): Item.model_construct(**one) for seq, one in plan["rewritten"].items()}
    changed = [*removed, *quarantined, *rewritten]
    before = tables.items(changed)
    states: dict[int, str] = dict(
        database.execute(
            "SELECT seq, state FROM items WHERE seq IN (SELECT value FROM json_each(?))",
            (json.dumps(changed),),
        )
    )
    learned.mark(tables, changed)
    for seq in changed:
        if states[seq] == "active":
            tables.unindex(seq, before[seq].found_by)
    steps.reached("database: the index has let go")
    for seq in removed:
        _bury(tables, before[seq], seq in roots)
        database.execute("DELETE FROM derived WHERE child = ? OR parent = ?", (seq, seq))
        database.execute("DELETE FROM items WHERE seq = ?", (seq,))
        steps.reached("database: an item is deleted")
    for seq in quarantined:
        database.execute(
            "UPDATE items SET state = 'quarantined', slot = NULL WHERE seq = ?", (seq,)
        )
    for seq, item in rewritten.items():
        _bury(tables, before[seq], root=False, but=item)
        tables.change(seq, item)
        if states[seq] == "active":
            tables.index(seq, item.found_by)
        steps.reached("database: an item is rebuilt")
    for seq, slot in plan["slots"].items():
        database.execute("UPDATE items SET slot = ? WHERE seq = ?", (slot, int(seq)))
    tables.optimise()
    tables.shift(int(plan["shift"]))
    record = {**plan["record"], "state_after": tables.state, "stale": sorted(learned.stale(tables))}
    database.execute("INSERT INTO deletions(record) VALUES(?)", (json.dumps(record),))
    steps.reached("database: clear the intent")
    database.execute("DELETE FROM intents")
    database.execute("DELETE FROM intended")


def _bury(tables: Tables, item: Item, root: bool, but: Item | None = None) -> None:
    """Later items that say this are refused, except what the item says from now on.

    What was made from something may be made again, from other things: only its text is refused.
    """
    kept = set() if but is None else {near(but.text), near(but.found_by)}
    for text in dict.fromkeys((item.found_by, item.text) if root else (item.text,)):
        if near(text) not in kept:
            tables.database.execute(
                "INSERT OR IGNORE INTO tombstones VALUES(?, ?)",
                (tables.alike(text), tables.same(text)),
            )


def recorded(tables: Tables) -> Deletion:
    """The last deletion."""
    row = tables.database.execute(
        "SELECT record FROM deletions ORDER BY number DESC LIMIT 1"
    ).fetchone()
    return Deletion(json.loads(row[0]))


def counted_state(tables: Tables, vectors: Vectors) -> str:
    """The state, summed up over all items."""
    rows = tables.database.execute("SELECT seq, state, slot FROM items ORDER BY seq").fetchall()
    total = 0
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        items = tables.items([seq for seq, _, _ in some])
        slots = [slot for _, _, slot in some if slot is not None]
        stored = dict(zip(slots, vectors.read(slots), strict=True))
        for seq, state, slot in some:
            vector = b"" if slot is None else stored[slot].tobytes()
            total += tables.weight(items[seq], state, vector)
    return f"{total % MODULUS:064x}"


__all__ = ["Change", "Deletion", "Rebuild", "carry_out", "counted_state", "intend", "planned",
           "recorded"]  # fmt: skip
