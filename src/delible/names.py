"""Names in texts: folding, and finding any number of names in one pass.

One Aho-Corasick pass over the text without its separators, so the time is linear in the text and
does not grow with the number of names. A hit counts only between word boundaries, and only where
its separators agree with the name's: "J o h n", "J.o.h.n" and "j0hn" are John; "Ann" is neither
in "Annual" nor in "an nuance". Names in another script are found by :mod:`delible.romanised`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from delible.errors import DataError
from delible.escaped import finished, unescaped
from delible.romanised import LEAST_SOUNDS, OTHER_SCRIPT, romanisations, sounds, spellings

JOINED, PUNCTUATION, SPACE = 0, 1, 2

#: Letters that look like Latin ones (Cyrillic and Greek by their capitals, Latin with strokes,
#: small capitals). Names and texts are folded alike, so no real name is lost by it.
LOOK_ALIKES: dict[int, int | str] = {
    **str.maketrans(
        "авекмнорстухіјѕѵԁԛԝһґ" "αβεζηικμνορτυχ" "ıøłđħŧðɑɡ" "օոսհ" "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ",
        "abekmhopctyxijsvdqwhr" "abezhikmnoptyx" "ioldhtdag" "onuh" "abcdefghijklmnoprstuvwyz",
    ),
    ord("æ"): "ae", ord("œ"): "oe", ord("þ"): "th",
}  # fmt: skip
#: What a digit may stand for inside a word; the symbols are first turned into such digits.
STANDS_FOR = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t"}
SYMBOLS = str.maketrans("@$|!", "4511")
SKELETON = str.maketrans("013457i", "oleastl")
#: Marks that ride on a letter and are dropped: accents, strike-through, variation selectors.
DROPPED_MARKS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
    "\u115f\u1160\u3164\uffa0\U000e0100-\U000e01ef]"
)
#: Scripts that put no space between words: a name may begin or end anywhere in them.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
#: A plain run, or one character; the parts of a Hangul syllable or voiced kana are one.
PIECES = re.compile(
    "[A-Za-z0-9]+|[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|.[\u3099\u309a]?", re.DOTALL
)
#: A word, or an ideograph.
SPOKEN = re.compile(f"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})[^\\W_])+")
#: A Hangul syllable in parts at the end of a text: another part may follow.
UNFINISHED = re.compile("[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?\\Z")


@dataclass(frozen=True, slots=True)
class Folded:
    """A text reduced to what is compared.

    Attributes:
        letters: Letters and digits only, folded; no separators.
        gaps: What stands before each letter, and after the last: nothing, punctuation, space.
        starts: Where in the text the character behind each letter begins.
        ends: Where it ends.
        trailing: What really stands after the last letter so far, should the text go on.
    """

    letters: str
    gaps: list[int]
    starts: list[int]
    ends: list[int]
    trailing: int = SPACE

    def cut(self, position: int) -> bool:
        """Whether a word may begin or end before the letter at this position."""
        return (
            self.gaps[position] != JOINED
            or UNSPACED.match(self.letters[position]) is not None
            or UNSPACED.match(self.letters[position - 1]) is not None
        )

    def words(self) -> list[str]:
        """The folded words, in order."""
        edges = [i for i, gap in enumerate(self.gaps) if gap != JOINED]
        return [self.letters[start:end] for start, end in pairwise(edges)]


@lru_cache(maxsize=1 << 16)
def _fold_piece(piece: str) -> str:
    marked = unicodedata.normalize(
        "NFKD", unicodedata.normalize("NFKD", piece).casefold()
    ).translate(LOOK_ALIKES)
    folded = unicodedata.normalize("NFC", DROPPED_MARKS.sub("", marked))
    return "".join(char for char in folded if unicodedata.category(char) != "Cf")


def fold(text: str) -> Folded:
    """Folds case, width, accents, look-alikes and invisible characters; keeps positions."""
    letters: list[str] = []
    gaps: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    gap = SPACE
    for piece in PIECES.finditer(text):
        start, end = piece.span()
        if end - start > 1 and piece.group().isascii():  # nothing to fold but case
            letters.append(piece.group().lower())
            gaps.append(gap)
            gaps += [JOINED] * (end - start - 1)
            starts += range(start, end)
            ends += range(start + 1, end + 1)
            gap = JOINED
            continue
        for char in _fold_piece(piece.group()):
            if char.isalnum() or unicodedata.category(char)[0] == "M":
                letters.append(char)
                gaps.append(gap)
                starts.append(start)
                ends.append(end)
                gap = JOINED
            else:
                gap = max(gap, SPACE if char.isspace() else PUNCTUATION)
    return Folded("".join(letters), [*gaps, SPACE], starts, ends, gap)


def sounded(text: str) -> Folded:
    """Reduces a text to its sounds, as Latin letters; a letter that is doubled is one."""
    letters: list[str] = []
    gaps: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    gap, after = SPACE, 0
    for word in SPOKEN.finditer(text):
        start = word.start()
        gap, after = max(gap, _between(text[after:start])), word.end()
        heard, places = sounds(word.group())
        for letter, place in zip(heard, places, strict=True):
            if gap == JOINED and letters and letters[-1] == letter:
                ends[-1] = start + place + 1
                continue
            letters.append(letter)
            gaps.append(gap)
            starts.append(start + place)
            ends.append(start + place + 1)
            gap = JOINED
        if UNSPACED.match(text, after - 1):
            gap = PUNCTUATION
    return Folded("".join(letters), [*gaps, SPACE], starts, ends, max(gap, _between(text[after:])))


def heard(name: str) -> list[Folded]:
    """How a name may sound, reduced as by :func:`sounded`."""
    if not name.isascii() and OTHER_SCRIPT.search(name):
        return [sounded(name)]
    found: dict[str, Folded] = {}
    for text in spellings(name):
        words, gaps, gap = list[str](), list[int](), SPACE
        for written, between in re.findall(r"([^\W_]+)([\W_]*)", text):
            words.append(re.sub(r"(.)\1+", r"\1", written))
            gaps += [gap, *[JOINED] * (len(words[-1]) - 1)]
            gap = _between(between)
        letters = "".join(words)
        found.setdefault(letters, Folded(letters, [*gaps, SPACE], [], []))
    return list(found.values())


def _between(text: str) -> int:
    """What stands between two words; marks and what is invisible are nothing."""
    seen = [one for one in text if unicodedata.category(one) not in ("Mn", "Mc", "Me", "Cf")]
    if not seen:
        return JOINED
    return SPACE if any(map(str.isspace, seen)) else PUNCTUATION


def settled(text: str) -> int:
    """How many characters of a text that goes on are folded alike whatever follows.

    A last character outside ASCII may wait for a voiced mark or the rest of its syllable, an escape
    for its other digits.
    """
    text = text[: finished(text)]
    if not text or text[-1].isascii():
        return len(text)
    unfinished = UNFINISHED.search(text, max(0, len(text) - 3))
    return unfinished.start() if unfinished else len(text) - 1


@dataclass(frozen=True, slots=True)
class Match:
    """A name found in a text, at ``text[start:end]``."""

    name: str
    start: int
    end: int


class Pattern(NamedTuple):
    """A name to find: as given, its folded letters, its gaps."""

    name: str
    letters: str
    gaps: bytes


def _agrees(name: Pattern, text: Folded, start: int) -> bool:
    """Whether the letters and separators at ``start`` are those of the name, tricks allowed."""
    size = len(name.letters)
    swapped = 0
    for wanted, seen in zip(name.letters, text.letters[start : start + size], strict=True):
        if seen != wanted:
            if wanted not in STANDS_FOR.get(seen, ""):
                return False
            swapped += 1
    if 2 * swapped >= size:  # "13" is a number, not the name Le
        return False
    if size >= 8 and SPACE in name.gaps[1:size]:
        return True  # long names of two words: no other text has these letters in this order
    for i in range(1, size):
        ours, theirs = name.gaps[i], text.gaps[start + i]
        if ours == theirs or PUNCTUATION in (ours, theirs):
            continue
        # Joined: only initials may be ("JK"). Split: only into single letters ("J o h n").
        whole: Sequence[int] = name.gaps if theirs == JOINED else text.gaps
        at = i if theirs == JOINED else start + i
        if JOINED in (whole[at - 1], whole[at + 1]) or size < 3:
            return False
    return True


class _Index:
    """Folded names in one automaton."""

    def __init__(self) -> None:
        import ahocorasick  # compiled; only when names are looked for

        self.automaton: Any = ahocorasick.Automaton()
        self.longest = 0
        self._patterns: dict[str, list[Pattern]] = {}

    def add(self, name: str, folded: Folded) -> None:
        skeleton = folded.letters.translate(SKELETON)
        pattern = Pattern(name, folded.letters, bytes(folded.gaps))
        known = self._patterns.setdefault(skeleton, [])
        if pattern not in known:
            known.append(pattern)

    def ready(self) -> None:
        for skeleton, entries in self._patterns.items():
            self.automaton.add_word(skeleton, (len(skeleton), entries))
            self.longest = max(self.longest, len(skeleton))
        if self._patterns:
            self.automaton.make_automaton()
        self._patterns = {}

    def found(self, folded: Folded, skeleton: str, until: int) -> Iterator[Match]:
        for last, (size, entries) in self.automaton.iter(skeleton):
            start = last + 1 - size
            ends = last < until and (folded.gaps[last + 1] or folded.cut(last + 1))
            if not (ends and folded.cut(start)):
                continue
            here = (pattern.name for pattern in entries if _agrees(pattern, folded, start))
            for name in dict.fromkeys(here):
                yield Match(name, folded.starts[start], folded.ends[last])


class Names:
    """Any number of names, found in a text in one pass.

    Args:
        names: What to find; a name of fewer than two letters is an error.

    Raises:
        DataError: A name is too short to be told from ordinary text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._written, self._sounds = _Index(), _Index()
        for name in dict.fromkeys(names):
            folded = fold(name)
            if len(folded.letters) < 2:
                raise DataError(
                    f"the name '{name}' has fewer than two letters and would match everywhere.",
                    hint="Give the full name.",
                )
            self._written.add(name, folded)
            for written in romanisations(name):
                self._written.add(name, fold(written))
            for sound in heard(name):
                if len(sound.letters) >= LEAST_SOUNDS:
                    self._sounds.add(name, sound)
        self._written.ready()
        self._sounds.ready()

    def find(self, text: str) -> Iterator[Match]:
        """Every occurrence of every name; time linear in the text and the occurrences."""
        for index, folded, skeleton in self._readings(text):
            yield from index.found(folded, skeleton, len(skeleton))

    def scan(self, text: str, since: int = 0, *, ended: bool = True) -> int | None:
        """Reads a text that goes on: held back is only what could still begin a name.

        Args:
            text: So far, from at least one letter before ``since``.
            since: A name that begins before this place does not count.
            ended: Nothing follows.

        Returns:
            How many characters belong to no name, whatever follows; None if a name occurs.
        """
        if not ended:
            text = text[: settled(text)]
        free = len(text)
        for index, folded, skeleton in self._readings(text):
            size = len(skeleton)
            # What ends with the text may still turn out to be a part of a longer word.
            whole = size if ended or folded.trailing != JOINED else size - 1
            if any(match.start >= since for match in index.found(folded, skeleton, whole)):
                return None
            if ended:
                continue
            for start in range(max(0, size - index.longest), size):
                if folded.starts[start] < since or not folded.cut(start):
                    continue
                if index.automaton.match(skeleton[start:]):
                    free = min(free, folded.starts[start])
                    break
        return free

    def _readings(self, text: str) -> Iterator[tuple[_Index, Folded, str]]:
        """Where it is looked up, the folded text, and what of it is looked up."""
        if self._written.longest:
            # "J@ne" needs the symbol as a letter, "@jane" as a separator: look at both readings.
            for reading in dict.fromkeys((text, text.translate(SYMBOLS), unescaped(text))):
                folded = fold(reading)
                yield self._written, folded, folded.letters.translate(SKELETON)
        if self._sounds.longest and OTHER_SCRIPT.search(plain := unescaped(text)):
            yield self._sounds, (folded := sounded(plain)), folded.letters.translate(SKELETON)

    def occur(self, text: str) -> bool:
        """Whether any name occurs."""
        return next(self.find(text), None) is not None


def surnames(targets: dict[str, list[str]]) -> list[str]:
    """Last words of names (three letters or more) that belong to one target only."""
    owners: dict[str, set[str]] = {}
    for target, names in targets.items():
        for words in (fold(name).words() for name in names):
            if len(words) > 1 and len(words[-1]) > 2:
                owners.setdefault(words[-1], set()).add(target)
    return [word for word, targets_of in owners.items() if len(targets_of) == 1]


def runs(text: str, words: int) -> set[str]:
    """Every run of so many consecutive folded words."""
    folded = fold(text).words()
    return {" ".join(folded[i : i + words]) for i in range(len(folded) - words + 1)}


class Runs:
    """Runs of consecutive words, found in a text that goes on.

    Args:
        runs: Folded words, joined by spaces, as :func:`runs` makes them.
        words: How many words each has.
    """

    def __init__(self, runs: Iterable[str], words: int) -> None:
        self._runs, self._words = frozenset(runs), words
        self._sorted = sorted(self._runs)

    def scan(self, text: str, since: int = 0, *, ended: bool = True) -> int | None:
        """As :meth:`Names.scan`: what could still begin a run is held back."""
        if not ended:
            text = text[: settled(text)]
        if not self._runs:
            return len(text)
        folded = fold(unescaped(text))
        words = folded.words()
        edges = [place for place, gap in enumerate(folded.gaps[:-1]) if gap != JOINED]
        open_ = not ended and folded.trailing == JOINED
        whole = len(words) - open_
        for place, edge in enumerate(edges):
            if folded.starts[edge] < since:
                continue
            if place + self._words <= whole:
                if " ".join(words[place : place + self._words]) in self._runs:
                    return None
            elif not ended and self._begins(" ".join(words[place:]) + ("" if open_ else " ")):
                return folded.starts[edge]
        return len(text)

    def _begins(self, text: str) -> bool:
        place = bisect_left(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)
