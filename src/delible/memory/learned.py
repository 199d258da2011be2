"""What was trained on items of a memory (a retriever, a scorer): stale when one of them goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from delible.errors import DataError, nearest
from delible.memory.database import Tables


def note(tables: Tables, name: str, ids: Sequence[str], file: str) -> None:
    """Something was trained, now, on these items and on no others.

    Raises:
        DataError: An item is not there.
    """
    places = tables.places(ids)
    lost = [one for one in ids if one not in places]
    if lost:
        raise DataError(f"'{name}' was trained on '{lost[0]}', which is not there.", where="memory")
    database = tables.database
    database.execute("INSERT OR REPLACE INTO learned VALUES(?, ?, 0)", (name, file))
    database.execute("DELETE FROM learned_from WHERE name = ?", (name,))
    database.executemany(
        "INSERT INTO learned_from VALUES(?, ?)", [(seq, name) for seq in places.values()]
    )


def mark(tables: Tables, seqs: Iterable[int]) -> None:
    """Items go or change: whatever was trained on them is stale by one more for each."""
    for seq in seqs:
        tables.database.execute(
            "UPDATE learned SET stale = stale + 1 WHERE name IN "
            "(SELECT name FROM learned_from WHERE seq = ?)",
            (seq,),
        )
        tables.database.execute("DELETE FROM learned_from WHERE seq = ?", (seq,))


def stale(tables: Tables) -> dict[str, int]:
    """Names of what is stale, and how many of its items have gone or changed."""
    return dict(
        tables.database.execute("SELECT name, stale FROM learned WHERE stale > 0 ORDER BY name")
    )


def noted(folder: Path, file: str | Path) -> str:
    """How a file is noted: from the memory's folder on if it lies in it, else wholly."""
    if not str(file):
        return ""
    whole, inside = Path(file).resolve(), folder.resolve()
    return str(whole.relative_to(inside) if whole.is_relative_to(inside) else whole)


def drop(tables: Tables, folder: Path, name: str, missing_ok: bool = False) -> None:
    """Forgets that something was trained, and deletes its file.

    Raises:
        DataError: Nothing of this name was trained.
    """
    known = dict(tables.database.execute("SELECT name, file FROM learned"))
    if name not in known:
        if missing_ok:
            return
        hint = nearest(name, known) if known else "Nothing was trained on this memory."
        raise DataError(f"nothing called '{name}' was trained.", where="memory", hint=hint)
    if known[name]:
        (folder / known[name]).unlink(missing_ok=True)
    tables.database.execute("DELETE FROM learned WHERE name = ?", (name,))
    tables.database.execute("DELETE FROM learned_from WHERE name = ?", (name,))


__all__ = ["drop", "mark", "note", "noted", "stale"]
