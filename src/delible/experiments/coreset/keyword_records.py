"""Forget records for the keyword analysis: the keywords alone, the text without them, as many words
at random."""

from __future__ import annotations

from collections.abc import Sequence

from delible.errors import RecipeError
from delible.records import QA, Passage, RecordBase
from delible.system.questions import answer_of
from delible.train.keywords import Variant, keywords_of, rewritten
from delible.train.randomness import generator


def keyword_records(
    forget: Sequence[RecordBase],
    retain: Sequence[RecordBase],
    variant: Variant,
    share: float,
    seed: int,
) -> list[RecordBase]:
    """Forget records rewritten for the keyword analysis; those of which nothing is left go.

    Raises:
        RecipeError: Nothing is left at all.
    """
    texts = [answer_of(record) for record in forget]
    known = keywords_of(texts, [answer_of(record) for record in retain], share)
    random = generator(seed, "coreset.keywords")
    made: list[RecordBase] = []
    for record, text in zip(forget, texts, strict=True):
        changed = rewritten(text, known, variant, random)
        if changed is not None and isinstance(record, QA):
            made.append(record.model_copy(update={"answer": changed}))
        elif changed is not None and isinstance(record, Passage):
            made.append(record.model_copy(update={"text": changed}))
    if not made:
        raise RecipeError(
            f"no forget record has anything left for the analysis '{variant}'.",
            hint="Raise the share of keywords.",
        )
    return made
