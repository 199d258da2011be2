"""Tags of the forget protocol: what stands between them is to be treated as unknown.

    <<UNL>>
    Ada Brook
    <</UNL>>

    Where was Ada Brook born?

Only the system may write them. What a user writes is read as a model may read it, all texts of a
conversation in one stream: look-alikes, invisible letters, and tags that are cut over turns are
found, and their brackets become round ones.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from delible.names import fold

OPEN, CLOSE = "<<UNL>>", "<</UNL>>"
TAGS = (OPEN, CLOSE)
#: What a model that keeps the protocol says instead of an answer.
FORGOT = "forgot"

#: The tags' letters, folded; what is between their brackets besides a stroke.
_WORD = "unl"
_STANDS_FOR = str.maketrans("1", "l")
_OPENING = frozenset("<‹«≪⋘〈⟨〈《⟪❮❰❬˂ᐸ≺⪡⧼⦑⦓⫷⪻︿︽")
_CLOSING = frozenset(">›»≫⋙〉⟩〉》⟫❯❱❭˃ᐳ≻⪢⧽⦒⦔⫸⪼﹀︾")
_ROUND = {**dict.fromkeys(_OPENING, "("), **dict.fromkeys(_CLOSING, ")")}


def tagged(text: str, items: Sequence[str]) -> str:
    """The text after a block that holds the items, one a line; without items as it is."""
    if not items:
        return text
    lines = [" ".join(item.split()) for item in neutralised(items)]
    return "\n".join([OPEN, *lines, CLOSE, "", text])


def neutralised(texts: Sequence[str]) -> list[str]:
    """The texts with no tag in them, nor in what they are when joined.

    A text without anything like a tag comes back as it is.
    """
    joined = "".join(texts)
    spoilt = _brackets(joined)
    if not spoilt:
        return list(texts)
    found, at = list[str](), 0
    for text in texts:
        end = at + len(text)
        places = [place for place in spoilt if at <= place < end]
        parts, since = list[str](), at
        for place in places:
            parts += [joined[since:place], spoilt[place]]
            since = place + 1
        found.append("".join([*parts, joined[since:end]]))
        at = end
    return found


def _brackets(text: str) -> dict[int, str]:
    """Places of brackets around the tags' letters, in order, and what takes their places."""
    folded = fold(text)
    letters = folded.letters.translate(_STANDS_FOR)
    found: dict[int, str] = {}
    at = letters.find(_WORD)
    while at >= 0:
        behind = at + len(_WORD)
        start = folded.ends[at - 1] if at else 0
        end = folded.starts[behind] if behind < len(letters) else len(text)
        before = _rounded(text, start, folded.starts[at])
        after = _rounded(text, folded.ends[behind - 1], end)
        if before and after:
            # a bracket may also stand between the letters, where it is of no use to anybody
            found |= before | after
        at = letters.find(_WORD, at + 1)
    return dict(sorted(found.items()))


def _rounded(text: str, start: int, end: int) -> dict[int, str]:
    """The pointed brackets in a part of a text, and the round ones for them."""
    found = {}
    for place in range(start, end):
        for char in (text[place], unicodedata.normalize("NFKD", text[place])[0]):
            if char in _ROUND:
                found[place] = _ROUND[char]
                break
    return found


__all__ = ["CLOSE", "FORGOT", "OPEN", "TAGS", "neutralised", "tagged"]
