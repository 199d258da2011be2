"""A store that remembers, and forgets what it is asked to with everything that was made from it.

A folder holds it: ``memory.db`` (items, what was made from what, an index of words),
``vectors.f32`` (their meaning), ``key`` (of all hashes) and ``lock``. One process writes at a time;
readers see the store before a change or after it. A search is exact: what it finds is what
comparing with every item finds.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from delible.errors import DataError, RunError
from delible.lm.encoder import Encoder, unit
from delible.memory import forgetting, learned, steps
from delible.memory.certificate import Certificate, of_deletion, of_memory
from delible.memory.closure import Closure, Descendants, closure, holding_whole, named
from delible.memory.database import Tables, exclusive, snapshot
from delible.memory.items import Found, Item, State
from delible.memory.pieces import sentinels, told_by
from delible.memory.place import Place
from delible.memory.scan import cleared, scan, seen, untold

NO_ENCODER = "none"
#: Characters of a text in a message.
SHOWN = 40
#: A name or text, or several.
Named = str | Sequence[str] | None


class Memory:
    """Items in a folder, found by words and by meaning.

    Args:
        folder: Where it is, or will be.
        encoder: Turns keys and queries into vectors; None: only words are searched.
        make_new: Make the folder if there is no memory in it.

    Raises:
        RunError: The folder holds no memory, or one that another encoder made.
    """

    def __init__(
        self, folder: str | Path, encoder: Encoder | None = None, *, make_new: bool = True
    ) -> None:
        self.folder, self.encoder = Path(folder), encoder
        self._place = Place(self.folder, make_new=make_new)
        self._reading, self._writing = self._place.reading, self._place.writing
        self.hashed = self._place.hashed
        with self._reading() as tables:
            self._check_encoder(tables)

    def __repr__(self) -> str:
        return f"Memory({str(self.folder)!r})"

    # ---- adding

    def add(self, items: Iterable[Item]) -> list[str]:
        """Adds items, all or none of them; an item may be made from one before it.

        Returns:
            Their ids.

        Raises:
            DataError: An id is taken, a parent is not there, or a text was deleted.
        """
        new = [one if one.id else one.model_copy(update={"id": uuid.uuid4().hex}) for one in items]
        vectors = self._encoded([one.found_by for one in new])
        with self._writing() as tables, exclusive(tables.database):
            if new:
                self._remember_encoder(tables, vectors)
            known = tables.places([parent for one in new for parent in one.parents])
            taken = tables.places([one.id for one in new], active=False)
            first, rows = tables.rows, dict[int, bytes]()
            shift = 0
            for number, item in enumerate(new):
                if item.id in taken:
                    raise DataError(f"the id '{item.id}' is taken.", where="memory")
                for parent in item.parents:
                    if parent not in known:
                        raise DataError(
                            f"'{item.id}' is made from '{parent}', which is not there.",
                            where="memory",
                            hint="Add it first; what is made from a deleted item is not added.",
                        )
                self.refuse_deleted(tables, item)
                slot = None if vectors is None else first + number
                row = b"" if vectors is None else vectors[number].tobytes()
                seq = tables.insert(item, slot, [known[parent] for parent in item.parents])
                known[item.id] = taken[item.id] = seq
                if slot is not None:
                    rows[slot] = row
                shift += tables.weight(item, "active", row)
                steps.reached("database: an item is added")
            tables.shift(shift)
            if rows:
                self._place.vectors(tables).write(rows)
        return [one.id for one in new]

    def refuse_deleted(self, tables: Tables, item: Item) -> None:
        """Raises if what an item says was deleted.

        Raises:
            DataError: It was, in these words or nearly.
        """
        for text in dict.fromkeys((item.found_by, item.text)):
            same = tables.database.execute(
                "SELECT max(same = ?) FROM tombstones WHERE alike = ?",
                (tables.same(text), tables.alike(text)),
            ).fetchone()[0]
            if same is not None:
                how = "" if same else ", in other case or spacing,"
                raise DataError(
                    f"'{text[:SHOWN]}'{how} was deleted from this memory.",
                    where="memory",
                    hint="It is not added again. If it may be, lift it first (Memory.lift).",
                )

    def lift(self, text: str) -> None:
        """Lets a deleted text be added again.

        Raises:
            DataError: It was not deleted.
        """
        with self._writing() as tables, exclusive(tables.database):
            alike = (tables.alike(text),)
            gone = tables.database.execute("DELETE FROM tombstones WHERE alike = ?", alike)
            if gone.rowcount == 0:
                raise DataError("this text was not deleted here.", where="memory")

    # ---- reading

    def __len__(self) -> int:
        """Active items."""
        with self._reading() as tables:
            return tables.active()

    def get(self, id_: str) -> Item:
        """An active item.

        Raises:
            DataError: There is none with this id.
        """
        with self._reading() as tables:
            found = tables.items(list(tables.places([id_]).values()))
        if not found:
            raise DataError(f"no item has the id '{id_}'.", where="memory")
        return next(iter(found.values()))

    def items(
        self, kind: str | None = None, subject: str | None = None, state: State = "active"
    ) -> list[Item]:
        """Items in the order in which they came."""
        with self._reading() as tables:
            return list(tables.items(tables.listed(kind, subject, state)).values())

    def search_words(self, query: str, count: int = 8, kind: str | None = None) -> list[Found]:
        """Items whose keys share words with a query, by BM25, the best first.

        Raises:
            RunError: This Python's SQLite has no FTS5.
        """
        with self._reading() as tables:
            return _found(tables, tables.matching(query, count, kind))

    def search(self, query: str, count: int = 8, kind: str | None = None) -> list[Found]:
        """Items whose keys mean what a query does, by cosine, the best first; exact.

        Raises:
            RunError: There is no encoder.
        """
        if self.encoder is None:
            raise RunError(
                "meaning cannot be searched without an encoder.",
                where=str(self.folder),
                hint="Open the memory with an encoder, or search for words.",
            )
        asked = unit(np.asarray(self.encoder.encode([query])))[0]
        with self._reading() as tables:
            self._check_encoder(tables)
            rows = tables.rows
            if not rows:
                return []
            among = None
            if kind is not None:
                among = np.array([slot for (slot,) in tables.database.execute(
                    "SELECT slot FROM items WHERE kind = ? AND slot IS NOT NULL", (kind,)
                )], dtype=np.int64)  # fmt: skip
            near = self._place.vectors(tables).closest(asked, rows, count, among)
            places = tables.database.execute(
                "SELECT seq, slot FROM items WHERE slot IN (SELECT value FROM json_each(?))",
                (json.dumps(list(near)),),
            )
            best = sorted(((-near[slot], seq) for seq, slot in places))[:count]
            return _found(tables, [(seq, -minus) for minus, seq in best])

    @property
    def encoder_identity(self) -> str:
        """Of the encoder that made its vectors; "none" if it has none; empty before the first."""
        with self._reading() as tables:
            return tables.setting("encoder")

    @property
    def state(self) -> str:
        """A hash of all items together, the same whatever was there before (hexadecimal)."""
        with self._reading() as tables:
            return tables.state

    def knows_deleted(self, text: str) -> bool:
        """Whether a text is one that is not added again."""
        with self._reading() as tables:
            return tables.database.execute(
                "SELECT 1 FROM tombstones WHERE alike = ?", (tables.alike(text),)
            ).fetchone() is not None  # fmt: skip

    # ---- forgetting

    def closure(
        self, *, ids: Iterable[str] = (), subject: Named = None, text: Named = None
    ) -> Closure:
        """What :meth:`forget` would concern; nothing is changed.

        Raises:
            DataError: An id is not there, or (NoMatchError) nothing matches.
        """
        with self._reading() as tables:
            return closure(tables, named(tables, ids, subject, text))

    def forget(
        self,
        *,
        ids: Iterable[str] = (),
        subject: Named = None,
        text: Named = None,
        descendants: Descendants = "delete",
        rebuild: forgetting.Rebuild | None = None,
        scanned: bool = True,
        reason: str = "",
    ) -> forgetting.Deletion:
        """Deletes items, those that say the same, and sees to everything made from them.

        Args:
            ids: Ids of items.
            subject: A name, or several: items about it, and items that hold it.
            text: Items that hold it; a text, or several.
            descendants: delete; quarantine (kept, but found by nobody); or rebuild them.
            rebuild: Is given a descendant and its parents that are left; makes it anew, or None.
                It may only read this memory.
            scanned: Look for what goes in the bytes of every file, before and afterwards.
            reason: Kept in the record.

        Raises:
            DataError: An id is lost, nothing matches (NoMatchError), or what was rebuilt holds it.
        """
        if (descendants == "rebuild") != (rebuild is not None):
            raise DataError("'rebuild' is a way to treat descendants and needs a function.")
        with self._writing() as tables:
            with snapshot(tables.database):
                chosen = closure(tables, named(tables, ids, subject, text))
                vectors = self._place.vectors(tables)
                change = forgetting.planned(
                    tables, vectors, chosen, descendants, rebuild, self._encoded
                )
                for item in change.rewritten.values():
                    self.refuse_deleted(tables, item)
            change.record |= {"reason": reason} if reason else {}
            gone = [chosen.members[seq].item for seq in (*change.removed, *change.rewritten)]
            pieces = [*sentinels(gone), *change.vectors_gone]
            before = seen(self.folder, tables, pieces) if scanned else None
            with exclusive(tables.database):
                forgetting.intend(tables, change)
            with exclusive(tables.database):
                forgetting.carry_out(tables, self._place.vectors(tables))
            deletion = forgetting.recorded(tables)
            after = cleared(self.folder, tables, pieces) if scanned else None
        unknown = untold(gone[: len(change.removed)], before, after)
        return replace(deletion, before=before, after=after, unknown=unknown)

    def certificate(self, deletion: forgetting.Deletion) -> Certificate:
        """What may be said of a deletion, and what may not."""
        with self._reading() as tables:
            return of_deletion(deletion, tables.name, learned.stale(tables), tables.indexed)

    def certify(self, texts: Sequence[str] = ()) -> Certificate:
        """Counts the state anew, looks for what came back, and scans every file.

        Args:
            texts: What should be in no file; what was deleted is not kept, so it cannot be known
                from here.
        """
        told = self.deletions()
        with self._writing() as tables:
            asked = [Item(text=text) for text in texts]
            scanned = scan(self.folder, tables, sentinels(asked))
            unknown, held = sum(not told_by(one) for one in asked), holding_whole(tables, texts)
            counted = forgetting.counted_state(tables, self._place.vectors(tables))
            return of_memory(scanned, tables.name, tables.state, counted, tables.returned(), told,
                             learned.stale(tables), held, unknown)  # fmt: skip

    def deletions(self) -> list[dict[str, Any]]:
        """What was deleted so far, without what it said."""
        with self._reading() as tables:
            rows = tables.database.execute("SELECT record FROM deletions ORDER BY number")
            return [json.loads(record) for (record,) in rows]

    def release(self, ids: Sequence[str]) -> None:
        """Lets quarantined items be found again.

        Raises:
            DataError: One of them is not quarantined.
        """
        with self._writing() as tables:
            held, active = tables.places(ids, active=False), tables.places(ids)
            items = tables.items([seq for id_, seq in held.items() if id_ not in active])
            lost = set(ids) - {one.id for one in items.values()}
            if lost:
                raise DataError(f"'{min(lost)}' is not quarantined.", where="memory")
            vectors = self._encoded([one.found_by for one in items.values()])
            with exclusive(tables.database):
                self._remember_encoder(tables, vectors)
                first, rows = tables.rows, dict[int, bytes]()
                for number, (seq, item) in enumerate(items.items()):
                    slot = None if vectors is None else first + number
                    vector = b"" if vectors is None else vectors[number].tobytes()
                    if slot is not None:
                        rows[slot] = vector
                    tables.release(seq, item, slot, vector)
                self._place.vectors(tables).write(rows)

    # ---- what was learned from items

    def learned(self, name: str, ids: Iterable[str], file: str | Path = "") -> None:
        """Notes that something was trained on items; until it is retrained, it can become stale.

        Raises:
            DataError: An item is not there.
        """
        with self._writing() as tables, exclusive(tables.database):
            learned.note(tables, name, list(ids), learned.noted(self.folder, file))

    def stale(self) -> dict[str, int]:
        """What was trained on items that have gone since, and on how many of them."""
        with self._reading() as tables:
            return learned.stale(tables)

    def drop_learned(self, name: str, *, missing_ok: bool = False) -> None:
        """Removes what was trained, with its file.

        Raises:
            DataError: There is no such thing.
        """
        with self._writing() as tables, exclusive(tables.database):
            learned.drop(tables, self.folder, name, missing_ok)

    # ---- meaning

    def _encoded(self, texts: Sequence[str]) -> Any:
        """Unit vectors, or None without an encoder or a text."""
        if self.encoder is None or not texts:
            return None
        return unit(np.asarray(self.encoder.encode(list(texts))))

    def _check_encoder(self, tables: Tables) -> None:
        """Raises if what is there was added with another encoder, or with none."""
        made_by = tables.setting("encoder")
        if self.encoder is not None and made_by not in ("", self.encoder.identity):
            others = "its vectors are another encoder's."
            raise RunError(
                "has no vectors." if made_by == NO_ENCODER else others,
                where=str(self.folder),
                hint="Open it with the encoder that it was made with, or without one.",
            )

    def _remember_encoder(self, tables: Tables, vectors: Any) -> None:
        self._check_encoder(tables)
        made_by = tables.setting("encoder")
        if self.encoder is None and made_by not in ("", NO_ENCODER):
            raise RunError(
                "has vectors, and so must what is added.",
                where=str(self.folder),
                hint="Open it with the encoder that it was made with.",
            )
        if not made_by:
            tables.set("encoder", self.encoder.identity if self.encoder else NO_ENCODER)
            tables.set("width", "0" if vectors is None else str(vectors.shape[1]))


def _found(tables: Tables, scored: Sequence[tuple[int, float]]) -> list[Found]:
    items = tables.items([seq for seq, _ in scored])
    return [Found(item=items[seq], score=score) for seq, score in scored]


__all__ = ["Memory"]
