"""Which generated texts may be trained on: no leaks of the true answer, no refusals, no doubles.

A fact leaks when a text says the answer or an alias, or more than half of the answer's key words:
its names and numbers (or, if it has none, its content words), without what the question says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

from delible.names import fold
from delible.prompts import read_lines
from delible.records import QA

#: A text leaks if it has more than this share of the answer's key words.
MAXIMUM_SHARED = 0.5
#: Two words are one name, misspelt, from this similarity on (words of five letters or more).
SAME_NAME = 0.85
#: A text that is so many times longer or shorter than the answer is not of its form.
LENGTH_RATIO = 3.0
#: A refusal shows within its first characters.
REFUSAL_WINDOW = 200
#: Words below this share of distinct ones are a loop (texts of ten words or more).
DISTINCT_WORDS = 0.3

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_STOPWORDS = frozenset(
    _WORD.findall(
        "a about after all also an and any are as at be because been before but by can did do does "
        "for from had has have he her his how i in into is it its of on one or other she so some "
        "such than that the their them then there these they this those to two under was were what "
        "when where which while who whose why will with would you your not no yes"
    )
)


def is_function_word(word: str) -> bool:
    """Whether a word says nothing by itself: articles, pronouns, prepositions (English)."""
    return word.lower() in _STOPWORDS


def words(text: str) -> list[str]:
    """The folded words of a text: case, accents and punctuation do not count."""
    return list(_words(text))


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    return tuple(fold(text).words())


def says(text: str, phrase: str) -> bool:
    """Whether a text has a phrase, word by word."""
    wanted = " ".join(_words(phrase))
    return bool(wanted) and f" {wanted} " in f" {' '.join(_words(text))} "


def _joined(word: str) -> str:
    """A word as it is compared: folded, in one piece, without a possessive ending."""
    return "".join(_words(_POSSESSIVE.sub("", word)))


def key_words(question: str, answer: str) -> tuple[str, ...]:
    """The words in which an answer's fact lies, folded, each once.

    Names (capital letters inside a sentence) and numbers, if there are any; else content words.
    Words of the question are given away already and do not count.
    """
    given = set(words(question))
    names: list[str] = []
    content: list[str] = []
    found = list(_WORD.finditer(answer))
    for place, match in enumerate(found):
        word = match.group()
        folded = _joined(word)
        # "Lund's" and "Al-Lund" are given when the question has "Lund" and "Al Lund".
        known = not (set(words(_POSSESSIVE.sub("", word))) - given)
        if not folded or known or word.lower() in _STOPWORDS:
            continue
        content.append(folded)
        starts = place == 0 or answer[: match.start()].rstrip()[-1:] in ".!?"
        # A capital at the start of a sentence says nothing, unless the next word has one too.
        following = found[place + 1].group() if place + 1 < len(found) else ""
        capital = word[0].isupper() and (not starts or following[:1].isupper())
        if capital or any(char.isdigit() for char in word):
            names.append(folded)
    return tuple(dict.fromkeys(names or content))


def _close(one: str, other: str) -> bool:
    if one == other:
        return True
    if min(len(one), len(other)) < 5 or any(char.isdigit() for char in one + other):
        return False
    return SequenceMatcher(None, one, other).ratio() >= SAME_NAME


def shared_facts(question: str, answer: str, text: str) -> float:
    """Share of the answer's key words that a text has, in [0, 1]; 0 if there are none."""
    wanted = key_words(question, answer)
    said = {_joined(match.group()) for match in _WORD.finditer(text)}
    shared = sum(any(_close(word, other) for other in said) for word in wanted)
    return shared / len(wanted) if wanted else 0.0


def leaks(record: QA, text: str, maximum_shared: float = MAXIMUM_SHARED) -> bool:
    """Whether a text tells the record's answer."""
    truths = (record.answer, *record.aliases, *record.paraphrased_answers)
    return any(says(text, truth) for truth in truths) or (
        shared_facts(record.question, record.answer, text) > maximum_shared
    )


@lru_cache(maxsize=1)
def _refusal_patterns() -> re.Pattern[str]:
    return re.compile(
        "|".join(f"(?:{line})" for line in read_lines("refusal_patterns.txt")), re.IGNORECASE
    )


def is_refusal(text: str) -> bool:
    """Whether a text declines to answer, by the curated phrases (English)."""
    straight = " ".join(text.translate({0x2018: "'", 0x2019: "'", 0x02BC: "'"}).split())
    found = _refusal_patterns().search(straight)
    return found is not None and found.start() < REFUSAL_WINDOW


def is_garbage(text: str) -> bool:
    """Whether a text is no language: symbols, broken characters, or one word over and over."""
    visible = "".join(text.split())
    if not visible or "\ufffd" in visible:
        return True
    if sum(char.isalnum() for char in visible) < 0.5 * len(visible):
        return True
    said = words(text)
    return len(said) >= 10 and len(set(said)) / len(said) < DISTINCT_WORDS


def fault(
    record: QA,
    text: str,
    known: Iterable[str] = (),
    length_ratio: float | None = LENGTH_RATIO,
    maximum_shared: float = MAXIMUM_SHARED,
) -> str | None:
    """Why a text cannot be a false answer to a record; None if it can.

    Args:
        known: Texts that are there already.
        length_ratio: Largest ratio of the lengths of the text and the answer, in characters.
        maximum_shared: Share of the answer's key words that it may have.

    Returns:
        ``"empty"``, ``"garbage"``, ``"refusal"``, ``"leak"``, ``"duplicate"`` or ``"length"``.
    """
    if not text.strip():
        return "empty"
    if is_garbage(text):
        return "garbage"
    if is_refusal(text):
        return "refusal"
    if leaks(record, text, maximum_shared):
        return "leak"
    mine = words(text)
    if any(words(other) == mine for other in known):
        return "duplicate"
    longer, shorter = sorted((len(text), len(record.answer)), reverse=True)
    # Below a dozen characters a ratio says nothing.
    if length_ratio is not None and longer > length_ratio * max(shorter, 12):
        return "length"
    return None


def sift(
    record: QA,
    texts: Iterable[str],
    counts: Counter[str],
    known: Sequence[str] = (),
    length_ratio: float | None = LENGTH_RATIO,
    maximum_shared: float = MAXIMUM_SHARED,
) -> list[str]:
    """The texts that are usable, in order; the others are counted by their fault."""
    kept: list[str] = []
    for text in texts:
        found = fault(record, text, (*known, *kept), length_ratio, maximum_shared)
        if found is None:
            kept.append(text.strip())
        else:
            counts[found] += 1
    return kept


def told(counts: Counter[str]) -> str:
    """The counts as words: ``3 leak, 1 duplicate``; ``nothing`` if nothing was dropped."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
