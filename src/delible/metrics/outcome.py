"""Outcome: is a generated answer correct, a refusal, wrong but fluent, or garbage?

Four classes, decided in this order, by rules that give the same class on every machine:

1. *correct*: it contains the gold answer, an alias or a paraphrased answer (whole words; case,
   accents, punctuation and articles ignored), or its ROUGE-L recall of one of them reaches
   ``rouge_threshold`` and is higher than that of every perturbed answer. Multiple choice: it
   picks the right option.
2. *refusal*: a phrase of ``prompts/refusal_patterns.txt`` begins within its first 200 characters.
3. *garbage*: it is empty, or mostly symbols, or repeats itself (few distinct character 8-grams),
   or mixes three scripts, or many of its words cannot be words.
4. *wrong-but-fluent*: everything else.

Not from a paper; unlearning surveys ask to tell these apart, since a broken model passes every
attack (SoK: Machine Unlearning for LLMs, arXiv 2506.09227). A judge model would be more exact and
less reproducible.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import (
    chosen_option,
    contains,
    generated,
    gold_answers,
    rouge_l_recall,
)
from delible.records import QA, Choice, Passage, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
)
from delible.system.questions import ask

OutcomeClass = Literal["correct", "refusal", "wrong-but-fluent", "garbage"]

REFUSAL_PATTERNS = Path(__file__).parents[1] / "prompts" / "refusal_patterns.txt"
REFUSAL_WINDOW = 200
NGRAM = 8
#: Below this many characters a repetition is no sign of a loop.
SHORTEST_LOOP = 40
MINIMUM_ALPHANUMERIC = 0.5
LONGEST_WORD = 24
MAXIMUM_SCRIPTS = 2

_INNER_SYMBOL = re.compile(r"[^\w'\u2019`\u00b4.,:;/&@+\u00b7\-\u2013\u2014()%$€£°]|_{2,}")
_INNER_CAPITAL = re.compile(r"[a-zß-ÿ][A-Z]")


@lru_cache(maxsize=1)
def _refusal_patterns() -> re.Pattern[str]:
    lines = REFUSAL_PATTERNS.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line.strip() and not line.startswith("#")]
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether an answer declines to answer, by the curated phrases."""
    straight = " ".join(text.translate({0x2018: "'", 0x2019: "'", 0x02BC: "'"}).split())
    found = _refusal_patterns().search(straight)
    return found is not None and found.start() < REFUSAL_WINDOW


def distinct_share(text: str) -> float:
    """Distinct character 8-grams over all of them, in (0, 1]; a loop of period p: about p/n."""
    joined = " ".join(text.casefold().split())
    total = len(joined) - NGRAM + 1
    if total < 1:
        return 1.0
    return len({joined[start : start + NGRAM] for start in range(total)}) / total


def _scripts(text: str) -> set[str]:
    """Scripts of the letters, by the first word of their Unicode names; Japanese is one."""
    found = set()
    for char in text:
        if char.isalpha():
            name = "LATIN" if char.isascii() else unicodedata.name(char, "UNKNOWN").split()[0]
            found.add("CJK" if name in {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"} else name)
    # Marks, ligatures and letters used as symbols are no script of their own.
    return found - {"MICRO", "FEMININE", "MASCULINE", "MODIFIER", "MATHEMATICAL"}


def is_odd_word(word: str) -> bool:
    """Whether a word is unlikely to be one in any language: a crude character test."""
    core = re.sub(r"^\W+|\W+$", "", word)
    if not any(char.isalpha() for char in core):
        return False
    if _INNER_SYMBOL.search(core) or len(_scripts(core)) > 1:
        return True
    if _scripts(core) != {"LATIN"}:
        return False
    parts = re.split(r"[\W_]+", core)
    if any(len(part) > LONGEST_WORD or _INNER_CAPITAL.search(part) for part in parts):
        return True
    plain = unicodedata.normalize("NFKD", core).casefold()
    return (
        core.isalpha() and len(core) > 4 and not core.isupper() and not set(plain) & set("aeiouy")
    )


def is_garbage(text: str, minimum_distinct: float, maximum_odd: float) -> bool:
    """Whether an answer is no language: empty, symbols, a loop, or non-words.

    Args:
        text: The answer.
        minimum_distinct: Least share of distinct character 8-grams (answers of 40 or more
            characters).
        maximum_odd: Greatest share of words that cannot be words.
    """
    visible = "".join(text.split())
    solid = sum(char.isalnum() or unicodedata.category(char)[0] == "M" for char in visible)
    if solid < MINIMUM_ALPHANUMERIC * len(visible) or not visible or "\ufffd\ufffd" in visible:
        return True
    if len(text.strip()) >= SHORTEST_LOOP and distinct_share(text) < minimum_distinct:
        return True
    if len(_scripts(visible)) > MAXIMUM_SCRIPTS:
        return True
    words = [word for word in text.split() if any(char.isalpha() for char in word)]
    return bool(words) and sum(map(is_odd_word, words)) / len(words) > maximum_odd


def is_correct(record: RecordBase, text: str, rouge_threshold: float) -> bool:
    """Whether an answer says the gold answer or an alias (see the module's rules)."""
    if isinstance(record, Choice):
        return chosen_option(text, record) == record.correct
    golds = gold_answers(record)
    if isinstance(record, QA):
        golds += record.paraphrased_answers
    if any(contains(text, gold) for gold in golds):
        return True
    recall = rouge_l_recall(golds, text) or 0.0
    if recall < rouge_threshold:
        return False
    perturbed = record.perturbed if isinstance(record, QA) else ()
    return recall > (rouge_l_recall(perturbed, text) or 0.0)


@register(
    kind="metric",
    name="outcome",
    title="Outcome of the answer",
    summary="Class of the greedy answer: correct, refusal, wrong-but-fluent or garbage.",
    family="outcome",
    capability="generate",
    changes="nothing",
    range="0 or 1 (the class is in the item's detail)",
    direction="1: the answer is correct, so the fact is said.",
    misleads="Rules, not understanding: a negated or hedged gold answer counts as correct, a "
    "correct answer in other words does not; a salad of real words counts as fluent; refusals "
    "are recognised in English only.",
    badges=("experimental",),
)
class Outcome(ItemMetric):
    """Value 1.0 for a correct answer, else 0.0; ``detail`` is the class."""

    max_new_tokens: int = Field(64, ge=1, le=8192, description="Tokens to generate at most.")
    rouge_threshold: float = Field(
        0.7, gt=0, le=1, description="ROUGE-L recall from which an answer counts as correct."
    )
    minimum_distinct: float = Field(
        0.35, ge=0, le=1, description="Share of distinct character 8-grams of a fluent answer."
    )
    maximum_odd: float = Field(
        0.4, ge=0, le=1, description="Share of words that cannot be words in a fluent answer."
    )

    def prompt(self, record: RecordBase) -> Prompt | None:
        if isinstance(record, Passage) or not gold_answers(record):
            return None
        return ask(record)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        return [Generate(prompt, Decoding(self.max_new_tokens))]

    def classify(self, record: RecordBase, text: str) -> OutcomeClass:
        """The class of an answer to a record."""
        if is_correct(record, text, self.rouge_threshold):
            return "correct"
        if is_refusal(text):
            return "refusal"
        # A bare letter is what a multiple-choice question asks for.
        if isinstance(record, Choice) and chosen_option(text, record) is not None:
            return "wrong-but-fluent"
        if is_garbage(text, self.minimum_distinct, self.maximum_odd):
            return "garbage"
        return "wrong-but-fluent"

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        found = self.classify(
            record, generated(answers[Generate(prompt, Decoding(self.max_new_tokens))])
        )
        return Item(1.0 if found == "correct" else 0.0, detail=found)
