"""Labelled queries for the search of a guard's prompt: what it should let pass, and what not."""

from __future__ import annotations

from random import Random

from delible.errors import DataError
from delible.loaders import read_records
from delible.records import ForgetRequest
from delible.search.instruction import Labelled
from delible.systems.likeness import general_questions
from delible.systems.record_texts import kept_by, questions_of

#: Queries of one class without which it is left out.
FEWEST = 4


def labelled_queries(
    request: ForgetRequest, file: str | None, per_class: int, share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Queries to learn from, and others to compare by.

    Unsafe are forget questions; safe are questions to keep, at most two thirds, and general ones.

    Args:
        request: What is forgotten and kept.
        file: Records of the groups ``safe`` and ``unsafe``, used instead.
        per_class: Queries of each class at most.
        share: Of them, to learn from.
        seed: Of the draws.

    Raises:
        DataError: The file cannot be read, or has a record of another group.
    """
    draw = Random(f"{seed}/examples")
    pools: dict[str, list[str]] = {"safe": [], "unsafe": []}
    if file is not None:
        for number, record in enumerate(read_records(file), start=1):
            if record.group not in pools:
                raise DataError(
                    f"the group of record {number} is neither 'safe' nor 'unsafe'.",
                    where=file,
                )
            pools[record.group] += questions_of(record)[:1]
    else:
        pools["unsafe"] = [q for record in request.forget for q in questions_of(record)[:1]]
        flagged = set(pools["unsafe"])
        kept = [q for record in kept_by(request) for q in questions_of(record)[:1]]
        kept = [question for question in dict.fromkeys(kept) if question not in flagged]
        near = draw.sample(kept, min(len(kept), 2 * per_class // 3))
        others = [one for one in general_questions() if one not in (*near, *flagged)]
        pools["safe"] = near + draw.sample(others, min(len(others), per_class - len(near)))
    train: list[Labelled] = []
    validation: list[Labelled] = []
    for label, texts in pools.items():
        different = list(dict.fromkeys(texts))
        draw.shuffle(different)
        different = different[:per_class]
        if len(different) >= FEWEST:
            learned = max(1, round(share * len(different)))
            train += [Labelled(text, label) for text in different[:learned]]
            validation += [Labelled(text, label) for text in different[learned:]]
    draw.shuffle(train)
    return train, validation


__all__ = ["labelled_queries"]
