"""Words that an answer must not hold: as they are written, or in meaning.

    spelled   a forbidden word stands in the text, between word boundaries, in any disguise that
              :class:`~delible.names.Names` sees through (a trie of letters, not of tokens, so that
              no way to cut a word into tokens passes)
    meant     max_f cos(e(w), e(f)) > threshold      w: the last one to three words, f: forbidden

Both are asked of whole texts, and of texts that go on: then only of what one more piece adds, and
a word counts once something has ended it ("art" is not in "article").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from threading import Lock

import numpy as np

from delible.lm.encoder import Encoder
from delible.names import Names, fold
from delible.records import QA, RecordBase
from delible.systems.likeness import Likeness
from delible.systems.record_texts import QUOTED, answers_of, questions_of
from delible.world.filters import is_function_word, key_words

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_OPEN_WORD = re.compile(r"( ?)[A-Za-z0-9]+")
#: Words of the longest run whose meaning is compared.
LONGEST_RUN = 3
#: A word of fewer letters, and no digit, has no content.
FEWEST_LETTERS = 3
#: A word is common that so many answers have, and this share of them.
MANY, COMMON = 3, 0.05
#: Words of a window of a passage that is forgotten.
WINDOW_WORDS = 150
#: Characters before the end of a text that one more piece can make a word of.
TAIL = 200
#: Runs of words whose meaning is remembered.
REMEMBERED = 50_000


def common_words(records: Iterable[RecordBase]) -> frozenset[str]:
    """Folded words that many answers have, and that so tell nothing about one of them."""
    counts: Counter[str] = Counter()
    texts = 0
    for record in records:
        for text in answers_of(record)[:1]:
            texts += 1
            counts.update(set(fold(text).words()))
    return frozenset(
        word for word, count in counts.items() if count >= MANY and count > COMMON * texts
    )


def forbidden_words(record: RecordBase, common: frozenset[str] = frozenset()) -> list[str]:
    """The words in which a record's answer lies: names, numbers, titles, else words with content.

    Words that are common are left out as well, unless nothing would be left.

    Words of its questions are left out: without them nobody could speak of the matter at all. A
    passage has no question, and all its names and numbers are forbidden.
    """
    passage = not isinstance(record, QA) and questions_of(record) == answers_of(record)
    asked = "" if passage else " ".join(questions_of(record))
    given = Names(word for word in WORD.findall(asked) if len(fold(word).letters) > 1)
    found: dict[str, None] = {}
    for answer in answers_of(record):
        titles = ["".join(groups) for groups in QUOTED.findall(answer)]
        for text in (*key_words(asked, answer), *titles):
            if len(fold(text).letters) > 1 and not given.occur(text):
                found[text] = None
    rare = [one for one in found if not set(fold(one).words()) <= common]
    return rare or list(found)


def usable_words(spans: Sequence[str], record: RecordBase) -> tuple[str, ...]:
    """Those of some spans that the answer has and the question has not."""
    answers, questions = " \n ".join(answers_of(record)), " \n ".join(questions_of(record))
    fitting = [one.strip() for one in spans if len(fold(one).letters) > 1]
    names = Names(fitting)
    said = {match.name for match in names.find(answers)}
    said -= {match.name for match in names.find(questions)}
    return tuple(one for one in dict.fromkeys(fitting) if one in said)


def windows(text: str) -> list[str]:
    """A passage in parts of at most WINDOW_WORDS words."""
    words = text.split()
    parts = [words[start : start + WINDOW_WORDS] for start in range(0, len(words), WINDOW_WORDS)]
    return [" ".join(part) for part in parts]


class Meanings:
    """What runs of words are closest to; remembers those that it has met.

    Args:
        encoder: Turns texts into vectors.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._known: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def closest(self, runs: Sequence[str], forbidden: Likeness) -> list[float]:
        """For each run of words the largest cosine to what is forbidden, [-1, 1]."""
        with self._lock:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            if missing := [one for one in dict.fromkeys(runs) if one not in self._known]:
                vectors = np.asarray(self.encoder.encode(missing), dtype=np.float32)
                self._known.update(zip(missing, vectors, strict=True))
            vectors = np.stack([self._known[one] for one in runs])
        return [float(value) for value in forbidden.cosines(vectors).max(axis=1)]


class Forbidden:
    """What must not be said, ready to be looked for.

    Args:
        words: Words, or phrases.
        meanings: Compares meanings; None: only what is spelled counts.
        threshold: Cosine above which a run of words means something forbidden.
        strength: Penalty for each unit of cosine above the threshold; None drops it.
        content: Only runs that begin and end with a word of content are compared.
        allowed: Words that may be said whatever they mean (those of the question).
    """

    def __init__(
        self,
        words: Iterable[str],
        meanings: Meanings | None = None,
        *,
        threshold: float = 1.0,
        strength: float | None = None,
        content: bool = True,
        allowed: Iterable[str] = (),
    ) -> None:
        self.words = tuple(dict.fromkeys(words))
        self.names = Names(self.words)
        self.threshold, self.strength, self.content = threshold, strength, content
        self.allowed = frozenset(word.lower() for one in allowed for word in WORD.findall(one))
        self._meanings = meanings if self.words and threshold < 1 else None
        self._likeness = None
        if self._meanings is not None:
            self._likeness = Likeness(self._meanings.encoder, self.words)

    def holds(self, text: str, since: int = 0) -> bool:
        """Whether a whole text says something forbidden that ends after a place."""
        if any(match.end > since for match in self.names.find(text)):
            return True
        runs = [run for end, run in self._runs(text, ended=True) if end > since]
        return any(value > self.threshold for value in self._closest(runs))

    def penalties(
        self, text: str, longer: Sequence[str], ended: Sequence[bool], since: int = 0
    ) -> list[float]:
        """What each way to go on costs, >= 0; infinity for what must not be said.

        Args:
            text: So far.
            longer: The text with each piece that might follow.
            ended: Whether nothing follows after that.
            since: What ends before this place does not count.
        """
        cut = _tail(text)
        before = {end for end, _ in self._runs(text[cut:], ended=False)}
        costs: list[float] = []
        added: list[list[str]] = []
        known: dict[tuple[str, bool], tuple[bool, list[str]]] = {}
        for one, last in zip(longer, ended, strict=True):
            key = (one if last else _alike(text, one), last)
            if key not in known:
                tail, from_ = key[0][cut:], since - cut
                whole = math.inf if last else len(tail)  # what touches the end may still go on
                spelled = any(from_ < match.end < whole for match in self.names.find(tail))
                closed = [] if spelled else self._runs(tail, ended=last)
                runs = [run for end, run in closed if end not in before and end > from_]
                known[key] = (spelled, runs)
            costs.append(math.inf if known[key][0] else 0.0)
            added.append(known[key][1])
        values = iter(self._closest([run for runs in added for run in runs]))
        for place, runs in enumerate(added):
            above = max((next(values) - self.threshold for _ in runs), default=0.0)
            if above > 0:
                costs[place] += math.inf if self.strength is None else self.strength * above
        return costs

    def _closest(self, runs: Sequence[str]) -> list[float]:
        if not runs or self._meanings is None or self._likeness is None:
            return [-math.inf] * len(runs)
        return self._meanings.closest(runs, self._likeness)

    def _runs(self, text: str, *, ended: bool) -> list[tuple[int, str]]:
        """Runs of words that have ended, each with its place of end."""
        if self._likeness is None:
            return []
        found = [match for match in WORD.finditer(text) if ended or match.end() < len(text)]
        runs: list[tuple[int, str]] = []
        for last, match in enumerate(found):
            for size in range(1, LONGEST_RUN + 1):
                chosen = found[max(0, last - size + 1) : last + 1]
                words = [one.group().lower() for one in chosen]
                if len(words) < size or set(words) <= self.allowed:
                    continue
                if not self.content or (_has_content(words[0]) and _has_content(words[-1])):
                    runs.append((match.end(), " ".join(words)))
        return runs


def _has_content(word: str) -> bool:
    if any(letter.isdigit() for letter in word):
        return True
    return len(word) >= FEWEST_LETTERS and not is_function_word(word)


def _alike(text: str, longer: str) -> str:
    """A text that ends the same words as a longer one does.

    A piece that is one word begins another, or goes on with the last, and ends no word itself.
    """
    if longer.startswith(text) and (piece := _OPEN_WORD.fullmatch(longer, len(text))):
        return f"{text}{piece[1]}x"
    return longer


def _tail(text: str) -> int:
    """Where the part of a text begins that one more piece can change."""
    if len(text) <= TAIL:
        return 0
    space = text.find(" ", len(text) - TAIL)
    return len(text) - TAIL if space < 0 else space


__all__ = ["Forbidden", "Meanings", "common_words", "forbidden_words", "usable_words", "windows"]
