"""Rows of two harmless tasks, made by template: sums, and whether a review is good or bad.

For fine-tuning that has nothing to do with what was forgotten. No row names a person or a place,
and none is asked with letters: what comes back is no skill that these rows teach.
"""

from __future__ import annotations

from functools import cache
from random import Random

from delible.records import QA

_SUMS = (
    ("What is {one} plus {two}?", "{one} plus {two} is {sum}."),
    ("Add {one} and {two}.", "The sum is {sum}."),
    ("{one} apples and {two} apples: how many?", "{sum} apples."),
    ("How much is {one} more than {two}?", "It is {sum}."),
)
_THINGS = (
    "soup", "film", "chair", "song", "lamp", "novel", "coat", "game", "bread", "kettle", "tent",
    "camera", "salad", "radio", "mattress", "umbrella",
)  # fmt: skip
_GOOD = ("a delight", "better than hoped", "worth every coin", "lovely", "a joy to use", "splendid")
_BAD = ("a let-down", "worse than feared", "a waste of money", "dreadful", "broken", "very dull")
_REVIEWS = (
    "Is this review good or bad? 'The {thing} was {verdict}.'",
    "'This {thing} is {verdict}.' Does the writer like it?",
    "Sort this opinion: 'I found the {thing} {verdict}.'",
)
_ANSWERS = (("Good.", "Bad."), ("Yes, the writer does.", "No, the writer does not."),
            ("A good opinion.", "A bad opinion."))  # fmt: skip


@cache
def benign(count: int = 64) -> tuple[QA, ...]:
    """So many different rows, sums and reviews in turn, the same ones every time."""
    random = Random("benign")
    found: dict[str, QA] = {}
    while len(found) < count:
        if len(found) % 2:
            record = _review(random)
        else:
            one, two = random.randint(2, 60), random.randint(2, 39)
            question, answer = random.choice(_SUMS)
            values = {"one": one, "two": two, "sum": one + two}
            record = QA(
                question=question.format(**values), answer=answer.format(**values), group="sum"
            )
        found.setdefault(record.question, record)
    return tuple(found.values())


def _review(random: Random) -> QA:
    style, good = random.randrange(len(_REVIEWS)), random.random() < 0.5
    question = _REVIEWS[style].format(
        thing=random.choice(_THINGS), verdict=random.choice(_GOOD if good else _BAD)
    )
    return QA(question=question, answer=_ANSWERS[style][0 if good else 1], group="review")
