"""Names from one script in another: how they are written in Latin, and how they sound.

A name in another script is looked for in Latin, too, in its usual romanisations: "Юлия Хрущёва" is
"Yuliya Khrushcheva", "Iuliia Hruscheva", …. And a name in Latin is looked for in texts of other
scripts: both are reduced to their sounds, letter by letter of the text, and by the ways that a name
may sound there: "Ada Brook" is "Ада Брук", and "Ада Броок".

What romanises is anyascii, letter by letter, so that a text may be read in pieces. Scripts without
vowels (Arabic, Hebrew) and those whose letters are read in several ways (Japanese kanji, Korean
names) are found only if an alias has the other spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

#: Letters that Latin is not written with.
OTHER_SCRIPT = re.compile(
    "[\u0370-\u1dbf\u1f00-\u1fff\u2c00-\u2c5f\u2c80-\u2dff\u3040-\ua71f\ua800-\uab2f\uab70-\uffdc"
    "\U00010000-\U0001d3ff\U0001e000-\U0001efff\U00020000-\U0003ffff]"
)
#: What a sound is written as by anyascii, and here.
_SOUNDS = {
    "shch": "s", "dzh": "dj", "zh": "j", "kh": "h", "ch": "c", "sh": "s", "th": "t", "ph": "f",
    "gh": "g",
}  # fmt: skip
_OWN = {"χ": "h", "Χ": "h", "c": "k"}
_LETTERS = str.maketrans({"y": "i", "w": "v", "q": "k", "x": "ks"})
#: How groups of Latin letters sound, in the script that the name is written in elsewhere; the usual
#: way first. Longer ones go first. An h is silent before a consonant, and at the end.
_HEARD: Sequence[tuple[str, tuple[str, ...]]] = (
    ("shch", ("s",)), ("sch", ("s", "sk")), ("tch", ("c",)), ("sh", ("s",)), ("zh", ("j",)),
    ("kh", ("h",)), ("ch", ("c", "h", "k")), ("ph", ("f",)), ("th", ("t", "th")), ("ck", ("k",)),
    ("tz", ("ts",)), ("qu", ("kv",)), ("oo", ("u", "o")), ("ee", ("i", "e")), ("ou", ("u", "ou")),
    ("yo", ("e", "io")), ("ye", ("e", "ie")), ("dj", ("dj",)), ("j", ("dj", "i", "j")),
    ("w", ("v", "u")), ("c", ("k", "s", "ts")), ("y", ("i", "ii")), ("q", ("k",)), ("x", ("ks",)),
    ("h(?=[aeiouy])", ("h", "g")), ("h", ("", "h")),
)  # fmt: skip
#: How romanisations differ, that of anyascii first.
_LATIN: Sequence[tuple[str, tuple[str, ...]]] = (
    ("shch", ("shch", "sch")), ("iya", ("iya", "ia", "iia", "ija")), ("yu", ("yu", "iu", "ju")),
    ("ya", ("ya", "ia", "ja")), ("kh", ("kh", "h", "ch")), ("zh", ("zh", "j")),
    ("ts", ("ts", "c", "tz")), ("ks", ("ks", "x")), ("iy", ("iy", "y", "i", "ij")),
    ("yy", ("yy", "y", "yi")), ("oy", ("oy", "ou", "oi", "oj")), ("y", ("y", "i", "j")),
)  # fmt: skip


def _groups(table: Sequence[tuple[str, tuple[str, ...]]]) -> re.Pattern[str]:
    """Finds a table's groups of letters; its ``lastindex`` is the row, from 1."""
    return re.compile("|".join(f"({letters})" for letters, _ in table))


_HEARD_GROUPS, _LATIN_GROUPS = _groups(_HEARD), _groups(_LATIN)
#: Spellings of one name that are looked for.
MOST_SPELLINGS = 4
MOST_ROMANISATIONS = 32
#: Fewer letters sound like too many words.
LEAST_SOUNDS = 6


@lru_cache(maxsize=1 << 12)
def sound(letter: str) -> str:
    """What a letter sounds like, in Latin letters; nothing of what has no sound.

    Args:
        letter: One character, of any script and case.
    """
    if letter in _OWN:
        return _OWN[letter]
    from anyascii import anyascii

    written = "".join(one for one in anyascii(letter).lower() if one.isalnum())
    for old, new in _SOUNDS.items():
        written = written.replace(old, new)
    return written.translate(_LETTERS)


@lru_cache(maxsize=1 << 14)
def sounds(word: str) -> tuple[str, tuple[int, ...]]:
    """What a word sounds like, and from which of its letters each sound is."""
    heard = [(one, place) for place, letter in enumerate(word) for one in sound(letter)]
    return "".join(one for one, _ in heard), tuple(place for _, place in heard)


def spellings(name: str) -> list[str]:
    """How a name in Latin may sound in texts of other scripts, the likeliest first."""
    text = name.lower()
    if not text.isascii():
        from anyascii import anyascii

        text = anyascii(text)
    return _written(text, _HEARD_GROUPS, _HEARD, MOST_SPELLINGS)


def _written(
    text: str, groups: re.Pattern[str], table: Sequence[tuple[str, tuple[str, ...]]], most: int
) -> list[str]:
    """At most so many ways to write a text; those that differ least from the usual one."""
    found, after = [(0, "")], 0
    for group in groups.finditer(text):
        before, ways = text[after : group.start()], table[(group.lastindex or 1) - 1][1]
        after = group.end()
        if len(ways) == 1:
            found = [(cost, done + before + ways[0]) for cost, done in found]
            continue
        more = [
            (cost + extra, done + before + way)
            for cost, done in found
            for extra, way in enumerate(ways)
        ]
        found = sorted(more, key=lambda one: one[0])[:most]
    return list(dict.fromkeys(done + text[after:] for _, done in found))


def romanisations(name: str) -> list[str]:
    """How a name in another script is written in Latin; nothing of one in Latin."""
    if not OTHER_SCRIPT.search(name):
        return []
    from anyascii import anyascii

    written = anyascii(name).replace("'", "")
    if sum(map(str.isalpha, written)) < 2:
        return []
    # ideographs are romanised without spaces, each with a capital: apart, and as given and family
    # name are written
    apart = re.sub("(?<=[a-z])(?=[A-Z])", " ", written).lower()
    found = dict.fromkeys(_written(apart, _LATIN_GROUPS, _LATIN, MOST_ROMANISATIONS))
    if apart != written.lower():
        first, _, rest = apart.partition(" ")
        found[f"{first} {rest.replace(' ', '')}"] = None
    return list(found)


__all__ = ["LEAST_SOUNDS", "OTHER_SCRIPT", "romanisations", "sounds", "spellings"]
