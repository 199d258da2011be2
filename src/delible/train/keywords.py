"""Keywords of forget texts without a language model: words that the retain texts seldom use.

Also what the keyword analysis of the coreset effect trains on: a text's keywords alone, the text
without them, or as many of its words at random.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
Variant = Literal["keywords", "without_keywords", "random_words"]


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return [word.lower() for word in _WORD.findall(text)]


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
