"""Looks for pieces of removed items in the bytes of every file of a memory.

A scan that finds nothing says something only if it would have found something. So a random text is
planted in the database first and must be found, and gone when it is taken out again; and the same
pieces are looked for before a deletion, too. A piece that what stays says as well tells nothing and
is counted apart. Other files may write a text in other ways (:mod:`delible.memory.pieces`), and a
name of a file may hold one, too.
"""

from __future__ import annotations

import mmap
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delible.memory.database import DATABASE, Tables
from delible.memory.items import Item, near
from delible.memory.pieces import SHORTEST, Sentinel, told_by
from delible.memory.vectors import VECTORS

#: Bytes that are looked at together.
CHUNK = 1 << 22
#: Hits of one piece in one file that are noted.
MOST_HITS = 20
PLANTED = "planted"
#: Names that every memory has; they tell nothing.
OWN = frozenset({DATABASE, VECTORS, "key", "lock"})
#: What is said instead of a file's name that holds a piece; a number follows.
HIDDEN = "(a name that holds a piece)"


@dataclass(frozen=True)
class Scanned:
    """What a scan found.

    Attributes:
        files: Every file that was read, and its bytes.
        looked_for: Pieces, each once.
        found: File and place of pieces that nothing accounts for; -1: in the file's name.
        shared: Pieces that something says that stays.
        unread: Links and the like, which are not followed.
        control: Whether the planted text was found, and was gone when it was taken out.
    """

    files: dict[str, int]
    looked_for: frozenset[Sentinel]
    found: tuple[tuple[str, int], ...]
    shared: frozenset[Sentinel]
    control: bool
    unread: int = 0


def seen(folder: Path, tables: Tables, looked_for: Sequence[Sentinel]) -> frozenset[Sentinel]:
    """Pieces that are in some file now."""
    own = [one for one in looked_for if one.kind != "otherwise"]
    hits, _ = _look(folder, tables, [one.piece for one in own])
    there = {piece for _, piece, _ in hits}
    return frozenset(one for one in own if one.piece in there)


def cleared(folder: Path, tables: Tables, looked_for: Sequence[Sentinel]) -> Scanned:
    """Scans; what is found in the database is cleared by writing the database anew.

    SQLite overwrites what it deletes, but not what it leaves behind where it moves rows from one
    page to another to fill them evenly: a deleted row that was moved before stays there in part.
    """
    found = scan(folder, tables, looked_for)
    if any(name == DATABASE for name, _ in found.found):
        tables.database.execute("VACUUM")
        found = scan(folder, tables, looked_for)
    return found


def scan(folder: Path, tables: Tables, looked_for: Sequence[Sentinel]) -> Scanned:
    """Scans every file below a folder, with a random text planted in the database.

    Args:
        tables: Of the writer, outside a transaction.
    """
    asked, planted = {one.piece: one for one in looked_for}, secrets.token_hex(24)
    tables.set(PLANTED, planted)
    own = [piece for piece, one in asked.items() if one.kind != "otherwise"]
    others = [piece for piece, one in asked.items() if one.kind == "otherwise"]
    hits, files = _look(folder, tables, [*own, planted.encode()], others=others)
    tables.database.execute("DELETE FROM settings WHERE name = ?", (PLANTED,))
    held = {name for name, piece, _ in hits if piece == planted.encode()}
    again, _ = _look(folder, tables, [planted.encode()], only=held)
    told, in_names = _named(files, [*asked])
    hits = [*(hit for hit in hits if hit[1] in asked), *in_names]
    said = _said_by_others(tables, {asked[piece].of or piece for _, piece, _ in hits})
    found, shared = [], set[Sentinel]()
    for name, piece, at in hits:
        one = asked[piece]
        row = name == VECTORS and one.kind == "vector" and at % len(piece) == 0
        if row or (one.of or piece) in said:  # a row, or a text, of an item that stays
            shared.add(one)
        else:
            found.append((told[name], at))
    return Scanned(
        {told[name]: size for name, size in files.items() if size is not None},
        frozenset(looked_for), tuple(found), frozenset(shared), bool(held) and not again,
        sum(size is None for size in files.values()),
    )  # fmt: skip


def untold(items: Sequence[Item], before: frozenset[Sentinel] | None, after: Scanned | None) -> int:
    """Items that went of which no piece can tell: none was seen before that nothing else says."""
    if before is None or after is None:
        return 0
    telling = {one.piece for one in before - after.shared}
    return sum(telling.isdisjoint(told_by(one)) for one in items)


def _named(
    files: Iterable[str], pieces: Sequence[bytes]
) -> tuple[dict[str, str], list[tuple[str, bytes, int]]]:
    """What is told instead of each name, and pieces that stand in names (of others' files)."""
    told, hits = dict[str, str](), list[tuple[str, bytes, int]]()
    names = {name: name.encode(errors="surrogateescape") for name in files}
    some = dict.fromkeys(piece for piece, _ in occurrences(b"\0".join(names.values()), pieces))
    for name, written in names.items():
        held = [] if name in OWN else [one for one in some if one in written]
        told[name] = f"{HIDDEN} {len(hits) + 1}" if held else name
        hits += [(name, one, -1) for one in held[:1]]
    return told, hits


def _look(
    folder: Path, tables: Tables, pieces: Sequence[bytes], *, only: set[str] | None = None,
    others: Sequence[bytes] = (),
) -> tuple[list[tuple[str, bytes, int]], dict[str, int | None]]:  # fmt: skip
    """Every place of every piece, and the size of every file; None: it is a link, or no file.

    Args:
        only: Only in these files.
        others: Pieces for files that a memory does not write by itself.

    Nobody else has the database open meanwhile: closing a file lets go of this process's locks.
    """
    hits, files = list[tuple[str, bytes, int]](), dict[str, int | None]()
    tables.database.execute("BEGIN EXCLUSIVE")
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if (path.is_dir() and not path.is_symlink()) or (only is not None and name not in only):
                continue
            if path.is_symlink() or not path.is_file():
                files[name] = None
                continue
            files[name] = size = path.stat().st_size
            if size == 0:
                continue
            wanted = pieces if name in OWN else [*pieces, *others]
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as it,
            ):
                hits += [(name, piece, at) for piece, at in occurrences(it, wanted)]
    finally:
        tables.database.execute("ROLLBACK")
    return hits, files


def occurrences(content: Any, pieces: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Places of pieces in bytes, the first few of each.

    However many pieces there are, most places are ruled out by a look at their first six bytes.
    """
    starts: dict[bytes, list[bytes]] = {}
    begins = np.zeros((3, 1 << 16), dtype=np.bool_)
    for piece in pieces:
        if len(piece) < SHORTEST:
            raise ValueError(f"a piece of {len(piece)} bytes stands anywhere by chance")
        starts.setdefault(piece[:SHORTEST], []).append(piece)
        for place in range(3):
            begins[place, piece[2 * place] | piece[2 * place + 1] << 8] = True
    longest, counts = max(map(len, pieces), default=0), Counter[bytes]()
    for start in range(0, len(content), CHUNK):
        part = content[start : start + CHUNK + longest - 1]
        numbers = np.frombuffer(part, dtype=np.uint8)
        pairs = numbers[:-1] | numbers[1:].astype(np.uint16) << 8
        ends = min(CHUNK, len(pairs) - 4)
        if ends < 1:
            continue
        places = np.flatnonzero(begins[0][pairs[:ends]])
        for later in (1, 2):
            places = places[begins[later][pairs[places + 2 * later]]]
        for at in places.tolist():
            for piece in starts.get(part[at : at + SHORTEST], ()):
                if part.startswith(piece, at) and counts[piece] < MOST_HITS:
                    counts[piece] += 1
                    yield piece, start + at


def _said_by_others(tables: Tables, pieces: set[bytes]) -> set[bytes]:
    """Pieces that items hold that are there now, or their ids."""
    left, said = set(pieces), set[bytes]()
    if not left:
        return said
    for (id_,) in tables.database.execute("SELECT id FROM items"):
        said |= {piece for piece in left if piece in id_.encode()}
    for _, key, text, subject, data, source in tables.texts():
        whole = "\0".join((key, text, subject, data, source))
        both = f"{whole}\0{near(whole)}".encode()
        new = {piece for piece in left - said if piece in both}
        said |= new
    return said


__all__ = ["Scanned", "Sentinel", "cleared", "occurrences", "scan", "seen", "untold"]
