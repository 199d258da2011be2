"""Keywords of forget texts without a language model: words that the retain texts seldom use.

Also what the keyword analysis of the coreset effect trains on: a text's keywords alone, the text
without them, or as many of its words at random. And names and numbers, by a written rule.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from delible.lm.pictures import without_pictures

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
Variant = Literal["keywords", "without_keywords", "random_words"]

_POSSESSIVE = re.compile(r"['’][sS]$")
#: What stands before a word that begins a sentence, from the end of the word before it on.
_SENTENCE_BREAK = re.compile(r"[.!?…][^\w\s]*\s|\n")
#: A full stop after these, or after a single letter (an initial), ends no sentence.
_TITLES = frozenset({"Mr", "Mrs", "Ms", "Dr", "Prof", "St"})
#: Tokens before one that are decoded with it, for its spacing and for characters of many tokens.
_CONTEXT_TOKENS = 4


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return [word.lower() for word in _WORD.findall(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of a text, in order."""
    return [match.span() for match in _WORD.finditer(text)]


def keywords_of(texts: Sequence[str], others: Sequence[str], share: float) -> frozenset[str]:
    """The words with the largest weight tf(w) log((1 + texts) / (1 + texts with w)).

    Args:
        texts: What is forgotten; tf counts here.
        others: What is kept; words that are common here weigh little.
        share: Of the different words of ``texts``; at least one word is taken.

    Returns:
        Words in lower case. Of words with equal weight the alphabetically first are taken.
    """
    counts = Counter(word for text in texts for word in words(text))
    inside: Counter[str] = Counter()
    for text in (*texts, *others):
        inside.update(set(words(text)))
    total = len(texts) + len(others)
    weights = {
        word: count * math.log((1 + total) / (1 + inside[word])) for word, count in counts.items()
    }
    ranked = sorted(weights, key=lambda word: (-weights[word], word))
    return frozenset(ranked[: max(1, round(share * len(ranked)))])


def rewritten(
    text: str, keywords: frozenset[str], variant: Variant, random: torch.Generator
) -> str | None:
    """A text for the keyword analysis; None when nothing would be left of it.

    Args:
        variant: ``keywords``: its keywords as they stand there, joined by commas;
            ``without_keywords``: the rest of the text; ``random_words``: as many of its words as
            it has keywords, drawn at random, in order.
    """
    found = [(match.start(), match.end(), match.group()) for match in _WORD.finditer(text)]
    keys = [one for one in found if one[2].lower() in keywords]
    if variant == "without_keywords":
        kept, end = [], 0
        for start, stop, _ in keys:
            kept.append(text[end:start])
            end = stop
        left = re.sub(r"\s+", " ", "".join((*kept, text[end:]))).strip()
        return left if words(left) else None
    if variant == "random_words":
        order = torch.randperm(len(found), generator=random).tolist()
        keys = [found[place] for place in sorted(order[: len(keys)])]
    return ", ".join(dict.fromkeys(word for _, _, word in keys)) or None


def name_spans(text: str, contexts: Sequence[str] = (), subject: str = "") -> list[tuple[int, int]]:
    """Where names and numbers stand in a text, by a written rule (no tagger).

    A word counts when it has a digit, or a capital letter that no sentence start explains. A word
    whose only capital begins a sentence counts when it is capitalised inside a sentence of this
    text or of the ``contexts``, or is a word of the ``subject``. The pronoun I and a possessive 's
    never count. So common nouns do not count, words of titles do, and scripts without capitals
    have numbers only.

    Returns:
        Start and end of each such word, in order.
    """
    found = list(_marked(text))
    known = {_POSSESSIVE.sub("", word) for word in _WORD.findall(subject)}
    for other in contexts:
        known.update(word for word, _, sure in _marked(other) if sure)
    known.update(word for word, _, sure in found if sure)
    return [(at, at + len(word)) for word, at, sure in found if sure or word in known]


def _marked(text: str) -> Iterator[tuple[str, int, bool]]:
    """Words with a digit or a capital: word, place, and whether no sentence start explains it."""
    before, end = "", 0
    for match in _WORD.finditer(text):
        word, gap = _POSSESSIVE.sub("", match.group()), text[end : match.start()]
        initial = len(before) == 1 and before.isupper()
        stops = _SENTENCE_BREAK.search(gap) and not (
            gap.startswith(". ") and (initial or before in _TITLES)
        )
        begins = not before or stops
        before, end = word, match.end()
        if word == "I" or word.startswith(("I'", "I’")):
            continue
        sure = any(letter.isdigit() or letter.isupper() for letter in word[1:])
        sure = sure or word[0].isdigit()
        if sure or word[0].isupper():
            yield word, match.start(), sure or not begins


def name_tokens(
    tokenizer: Any,
    before: Sequence[int],
    ids: Sequence[int],
    contexts: Sequence[str] = (),
    subject: str = "",
) -> tuple[bool, ...]:
    """Which tokens have a character of a name or number (see :func:`name_spans`).

    Args:
        before: The tokens before ``ids``, which are not part of the text that is looked at.
        ids: The tokens of the text. Special tokens are False.
    """
    text, places = decoded(tokenizer, before, ids)
    spans = name_spans(text, contexts, subject)
    special = set(tokenizer.all_special_ids)
    return tuple(
        token not in special and any(start < last and first < end for first, last in spans)
        for token, (start, end) in zip(ids, places, strict=True)
    )


def tokens_of(
    tokenizer: Any, ids: Sequence[int], text: str, before: int | None = None
) -> tuple[int, int] | None:
    """First token of a text's last occurrence as whole words, and behind its last one.

    Args:
        before: Only among so many of the first tokens.
    """
    said, places = decoded(tokenizer, (), ids[:before])
    found = list(re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", said))
    if not text or not found:
        return None
    first, last = found[-1].span()
    inside = [index for index, (start, end) in enumerate(places) if start < last and first < end]
    return (inside[0], inside[-1] + 1) if inside else None


def decoded(
    tokenizer: Any, before: Sequence[int], ids: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of ``ids`` and each token's place in it; tokens of one character share its place."""

    def read(tokens: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                without_pictures(tokens, tokenizer), clean_up_tokenization_spaces=False
            )
        )

    text = ""
    places: list[tuple[int, int]] = []
    row, settled = [*before, *ids], len(before)
    for end in range(len(before) + 1, len(row) + 1):
        first = max(0, settled - _CONTEXT_TOKENS)
        piece = read(row[first:end])[len(read(row[first:settled])) :]
        if piece.endswith("\ufffd") and end < len(row):
            continue  # the first bytes of a character
        places += [(len(text), len(text) + len(piece))] * (end - settled)
        text += piece
        settled = end
    return text, places
