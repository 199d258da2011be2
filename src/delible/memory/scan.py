"""Looks for pieces of removed items in the bytes of every file of a memory.

A scan that finds nothing says something only if it would have found something. So a random text is
planted in the database first and must be found, and gone when it is taken out again; and the same
pieces are looked for before a deletion, too. A piece that what stays says as well tells nothing and
is counted apart.
"""

from __future__ import annotations

import mmap
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from delible.memory.database import DATABASE, Tables
from delible.memory.items import Item, near
from delible.memory.vectors import VECTORS

#: Bytes of a piece at most, and at least: fewer stand anywhere by chance.
LONGEST, SHORTEST = 24, 6
#: Letters of a word that is looked for in the index of words, and how many of its last ones: the
#: index leaves out how a word begins if the one before begins so, too.
LONG_WORD, WORD_END = 9, 8
#: Bytes that are looked at together.
CHUNK = 1 << 22
#: Hits of one piece in one file that are noted.
MOST_HITS = 20
#: Characters that a file may write otherwise than a text does.
WRITTEN_OTHERWISE = re.compile(r'[\x00-\x1f\x7f"\\]+')
PLANTED = "planted"


@dataclass(frozen=True)
class Sentinel:
    """A piece by which something removed would be recognised.

    Attributes:
        kind: Of a text, of an id, the end of a word, or a vector's numbers.
    """

    kind: Literal["text", "id", "word", "vector"]
    piece: bytes = field(repr=False)


@dataclass(frozen=True)
class Scanned:
    """What a scan found.

    Attributes:
        files: Every file that was read, and its bytes.
        looked_for: Pieces, each once.
        found: File and place of pieces that nothing accounts for.
        shared: Pieces that something says that stays.
        control: Whether the planted text was found, and was gone when it was taken out.
    """

    files: dict[str, int]
    looked_for: frozenset[Sentinel]
    found: tuple[tuple[str, int], ...]
    shared: int
    control: bool


def sentinels(items: Iterable[Item]) -> list[Sentinel]:
    """Pieces of what items say, and of their ids."""
    found: dict[Sentinel, None] = {}
    for item in items:
        for text in (*item.says(), item.subject, item.source):
            found |= dict.fromkeys(Sentinel("text", piece) for piece in _pieces(text))
        found |= dict.fromkeys(Sentinel("id", piece) for piece in _pieces(item.id))
        words = [word for word in re.findall(r"\w+", near(item.found_by)) if len(word) >= LONG_WORD]
        found |= dict.fromkeys(Sentinel("word", word.encode()[-WORD_END:]) for word in words)
    return list(found)


def _pieces(text: str) -> Iterator[bytes]:
    """The beginning, the middle and the end of what is written as it is."""
    for part in WRITTEN_OTHERWISE.split(text):
        whole = part.encode()
        if len(whole) >= SHORTEST:
            starts = (0, (len(whole) - LONGEST) // 2, len(whole) - LONGEST)
            yield from dict.fromkeys(whole[max(0, at) : max(0, at) + LONGEST] for at in starts)


def seen(folder: Path, tables: Tables, looked_for: Sequence[Sentinel]) -> frozenset[Sentinel]:
    """Pieces that are in some file now."""
    hits, _ = _look(folder, tables, [one.piece for one in looked_for])
    there = {piece for _, piece, _ in hits}
    return frozenset(one for one in looked_for if one.piece in there)


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
    hits, files = _look(folder, tables, [*asked, planted.encode()])
    tables.database.execute("DELETE FROM settings WHERE name = ?", (PLANTED,))
    held = {name for name, piece, _ in hits if piece == planted.encode()}
    again, _ = _look(folder, tables, [planted.encode()], held)
    hits = [hit for hit in hits if hit[1] in asked]
    said = _said_by_others(tables, {piece for _, piece, _ in hits})
    found, shared = [], set[bytes]()
    for name, piece, at in hits:
        whole_row = asked[piece].kind == "vector" and at % len(piece) == 0
        if piece in said or (whole_row and name == VECTORS):  # a row of an item that stays
            shared.add(piece)
        else:
            found.append((name, at))
    return Scanned(
        files, frozenset(looked_for), tuple(found), len(shared), bool(held) and not again
    )


def _look(
    folder: Path, tables: Tables, pieces: Sequence[bytes], only: set[str] | None = None
) -> tuple[list[tuple[str, bytes, int]], dict[str, int]]:
    """Every place of every piece, and the size of every file.

    Nobody else has the database open meanwhile: closing a file lets go of this process's locks.
    """
    hits, files = list[tuple[str, bytes, int]](), dict[str, int]()
    tables.database.execute("BEGIN EXCLUSIVE")
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or path.is_symlink() or (only is not None and name not in only):
                continue
            files[name] = path.stat().st_size
            if files[name] == 0:
                continue
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as it,
            ):
                hits += [(name, piece, at) for piece, at in occurrences(it, pieces)]
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


__all__ = ["Scanned", "Sentinel", "occurrences", "scan", "seen", "sentinels"]
