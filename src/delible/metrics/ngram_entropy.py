"""N-gram entropy (RWKU's fluency): does a long answer vary, or does it repeat itself?

    ( 2/3 H_2 + 4/3 H_3 ) / 2,    H_n = -sum_g f_g log2 f_g over the n-grams g of the answer's words

Paper: RWKU (arXiv 2406.10890), after ROME (arXiv 2202.05262); reference code: jinzhuoran/RWKU.
Deviation: the reference code's tokenizer needs a downloaded model to find sentences; here a word is
a run of letters, digits, inner apostrophes and hyphens, and every other visible character is a
word of its own. An answer without n-grams has entropy 0, as there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import generated
from delible.records import QA, Dialogue, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)
from delible.system.questions import ask

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
#: Length of the n-grams and their weights.
WEIGHTS = ((2, 2 / 3), (3, 4 / 3))


def entropy(words: Sequence[str], length: int) -> float:
    """Entropy of a text's n-grams, in bits.

    Args:
        words: The text's words, in order.
        length: n.

    Returns:
        A value in [0, log2(number of n-grams)]; 0 for a text shorter than n.
    """
    grams = Counter(zip(*(words[start:] for start in range(length)), strict=False))
    counts = np.asarray(list(grams.values()), np.float64)
    if counts.size < 2:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies of pairs and triples of words, in bits; >= 0."""
    words = _WORD.findall(text)
    return sum(weight * entropy(words, length) for length, weight in WEIGHTS) / len(WEIGHTS)


@register(
    kind="metric",
    name="ngram_entropy",
    title="N-gram entropy",
    summary="Entropy of the word pairs and triples of a long answer: falls when it repeats itself.",
    paper="2406.10890",
    year=2024,
    family="utility",
    capability="generate",
    changes="nothing",
    range="[0, inf) bits",
    direction="High: the answer varies. A model that loops is near 0; fluent answers of 256 tokens "
    "are near 7.",
    misleads="Random words have the highest entropy of all, so a high value is no proof of "
    "language. Grows with the length: short correct answers are low.",
    variant="Words are found without a downloaded sentence model.",
    badges=("parity", "variant"),
)
class NgramEntropy(ItemMetric):
    """Entropy of the greedy answer to a question or instruction."""

    max_new_tokens: int = Field(256, ge=1, le=8192, description="Tokens to generate at most.")

    def prompt(self, record: RecordBase) -> Prompt | None:
        return ask(record) if isinstance(record, QA | Dialogue) else None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        return Item(
            ngram_entropy(generated(answers[Generate(prompt, Decoding(self.max_new_tokens))]))
        )
