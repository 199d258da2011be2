"""What must not be named: the entities that tell about a subject.

From the records (subjects, answers and their aliases), or by the role ``writer``, which reads the
model's own answers to the questions and lists what identifies the subject in them. Entities that
are ordinary words (one word, in lower case, without a digit) are *soft*: a match of them says
little.

Paper: arXiv 2601.20568, whose prompts are not published: ours are files of ``prompts/``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from delible.errors import DataError
from delible.generation.writing import filled
from delible.names import fold
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.role import Role
from delible.world import filters

#: Words of an entity at most: longer ones are sentences.
LONGEST = 6


class Entities(BaseModel):
    """What a writer replies."""

    entities: list[str]


def is_soft(entity: str) -> bool:
    """Whether an entity is an ordinary word."""
    words = entity.split()
    plain = entity == entity.lower() and not any(char.isdigit() for char in entity)
    return (len(words) == 1 and plain) or all(filters.is_function_word(word) for word in words)


def cleaned(entity: str) -> str | None:
    """An entity as it is looked for; None where it is none."""
    text = re.sub(r"^(?:a|an|the|in|at|on|by|from)\s+", "", " ".join(entity.split()), flags=re.I)
    text = text.strip(" .,;:!?\"'")
    fits = len(fold(text).letters) >= 2 and len(text.split()) <= LONGEST
    return text if fits else None


def pooled(texts: Sequence[str], most: int) -> list[str]:
    """Entities, cleaned, each once, those that are named most often first."""
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for text in texts:
        one = cleaned(text)
        if one is not None:
            key = fold(one).letters
            written.setdefault(key, one)
            counts[key] += 1
    order = {key: place for place, key in enumerate(written)}
    best = sorted(counts, key=lambda key: (-counts[key], order[key]))[:most]
    return [written[key] for key in best]


def from_records(records: Sequence[QA]) -> list[str]:
    """Answers and their aliases, and the names and numbers in those that are sentences."""
    found = []
    for record in records:
        for text in (record.answer, *record.aliases):
            if len(text.split()) <= LONGEST:
                found.append(text)
            else:
                found += re.findall(
                    r"(?<![\w'\u2019])[A-Z0-9][\w'\u2019-]*(?:\s+[A-Z0-9][\w'\u2019-]*)*", text
                )
    asked = {word for record in records for word in filters.words(record.question)}
    return [text for text in found if not set(filters.words(text)) <= asked]


def extracted(
    writer: Role, system: System, records: Sequence[QA], subjects: Sequence[str], tokens: int
) -> tuple[list[str], dict[str, int]]:
    """What a writer finds in the model's own answers, and how many of its replies failed."""
    prompts = [Prompt.ask(one.question) for one in records]
    answers = system.generate(prompts, Decoding(tokens))
    counts: Counter[str] = Counter()
    asked = [
        filled(
            "forbidden_extract.txt", subject=record.subject or ", ".join(subjects),
            question=record.question, answer=answer,
        )
        for record, answer in zip(records, answers, strict=True) if isinstance(answer, str)
    ]  # fmt: skip
    found: list[str] = []
    for answer, reply in zip(
        [one for one in answers if isinstance(one, str)],
        writer.ask_all(asked, Entities, Decoding(256)), strict=True,
    ):  # fmt: skip
        if isinstance(reply, NoAnswer):
            counts["no answer"] += 1
            continue
        for entity in reply.entities:
            said = filters.says(answer, entity)
            counts["found" if said else "not in the answer"] += 1
            if said:
                found.append(entity)
    return found, dict(counts)


def forbidden(
    records: Sequence[QA],
    subjects: Sequence[str],
    *,
    writer: Role | None,
    system: System,
    most: int = 50,
    tokens: int = 64,
    where: str = "forbidden entities",
) -> tuple[list[str], list[str], dict[str, int]]:
    """Hard and soft entities, the subjects first, and what was counted on the way.

    Raises:
        DataError: There is none.
    """
    if writer is None:
        found, counts = from_records(records), {"from records": len(records)}
    else:
        found, counts = extracted(writer, system, records, subjects, tokens)
    names = [one for subject in subjects if (one := cleaned(subject))]
    every = list(dict.fromkeys([*names, *pooled(found, most)]))
    hard = [one for one in every if one in names or not is_soft(one)][:most]
    soft = [one for one in every if one not in hard and is_soft(one)]
    if not hard:
        raise DataError(
            "nothing was found that must not be named.",
            where=where,
            hint="Give entities, records with answers, subjects, or a model that finds them "
            "(--role writer=MODEL).",
        )
    return hard, soft, counts


__all__ = ["cleaned", "extracted", "forbidden", "from_records", "is_soft", "pooled"]
