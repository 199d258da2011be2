"""Pieces by which something removed would be recognised, and other ways to write them.

A memory writes texts as UTF-8. What lies beside it in the folder may not: JSON as numbers of
letters, some programs as UTF-16, people in another case; and letters with accents are one sign or
two. Of a long text some may be left where it stood, so its pieces lie close together.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from delible.memory.items import Item, near

#: Bytes of a piece at most, and at least: fewer stand anywhere by chance.
LONGEST, SHORTEST = 24, 6
#: Bytes from where one piece begins to where the next does, and pieces of one text, at most.
APART, MOST_PIECES = 40, 64
#: Letters of a word that is looked for in the index of words, and how many of its last ones: the
#: index leaves out how a word begins if the one before begins so, too.
LONG_WORD, WORD_END = 9, 8
#: Characters that a file may write otherwise than a text does.
WRITTEN_OTHERWISE = re.compile(r'[\x00-\x1f\x7f"\\]+')


@dataclass(frozen=True)
class Sentinel:
    """A piece by which something removed would be recognised.

    Attributes:
        kind: Of a text, of an id, the end of a word, a vector's numbers, or (otherwise) of a text
            as a memory does not write it.
        of: For the latter: the piece as a memory writes it.
    """

    kind: Literal["text", "id", "word", "vector", "otherwise"]
    piece: bytes = field(repr=False)
    of: bytes = field(default=b"", repr=False)


def sentinels(items: Iterable[Item]) -> list[Sentinel]:
    """Pieces of what items say, and of their ids."""
    found: dict[Sentinel, None] = {}
    others: dict[bytes, bytes] = {}
    for item in items:
        for text in (*item.says(), item.subject, item.source):
            found |= dict.fromkeys(Sentinel("text", piece) for piece in _pieces(text))
            others |= {one: piece.encode() for piece in _ends(text) for one in otherwise(piece)}
        found |= dict.fromkeys(Sentinel("id", piece) for piece in _pieces(item.id))
        words = [word for word in re.findall(r"\w+", near(item.found_by)) if len(word) >= LONG_WORD]
        found |= dict.fromkeys(Sentinel("word", word.encode()[-WORD_END:]) for word in words)
    known = {one.piece for one in found}
    return [*found, *(
        Sentinel("otherwise", piece, of) for piece, of in others.items() if piece not in known
    )]  # fmt: skip


def told_by(item: Item) -> frozenset[bytes]:
    """Pieces of what an item itself says, as a memory writes it."""
    return frozenset(piece for text in item.says() for piece in _pieces(text))


def otherwise(text: str) -> Iterator[bytes]:
    """A text as others may write it: another case or normal form, UTF-16, letters as numbers."""
    forms = {text.casefold(), text.upper(), *(
        unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC")
    )}  # fmt: skip
    if not text.isascii():
        forms.add(json.dumps(text)[1:-1])
    for form in sorted(forms - {text}):
        yield form.encode()
    yield text.encode("utf-16-le")
    yield text.encode("utf-16-be")


def _parts(text: str) -> Iterator[bytes]:
    """What of a text is written as it is."""
    for part in WRITTEN_OTHERWISE.split(text):
        if len(whole := part.encode()) >= SHORTEST:
            yield whole


def _pieces(text: str) -> Iterator[bytes]:
    """The beginning, the end, and evenly between, of what is written as it is."""
    for whole in _parts(text):
        room = max(0, len(whole) - LONGEST)
        count = min(MOST_PIECES, max(3, 1 - (-room // APART)))
        starts = (number * room // (count - 1) for number in range(count))
        yield from dict.fromkeys(whole[at : at + LONGEST] for at in starts)


def _ends(text: str) -> Iterator[str]:
    """The beginning, the middle and the end, in whole letters."""
    for whole in _parts(text):
        room = max(0, len(whole) - LONGEST)
        for at in dict.fromkeys((0, room // 2, room)):
            piece = whole[at : at + LONGEST].decode(errors="ignore")
            if len(piece.encode()) >= SHORTEST:
                yield piece


__all__ = ["LONGEST", "SHORTEST", "Sentinel", "otherwise", "sentinels", "told_by"]
