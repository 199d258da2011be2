"""Boundary questions: next to what is forgotten, and to be answered all the same.

For each forget question one (or several) of the same form about somebody else, with a short
answer: from the request's neighbours and retain records, by the likeness of their wording without
the names (exact for records of one template, as a world's), or written by the role ``writer``,
which changes the question as little as possible. What still names the forgotten is dropped, and so
is what has no answer or a long one.

Paper: arXiv 2506.07171, whose prompts are not published: ours are files of ``prompts/``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from delible.errors import DataError
from delible.generation.rows import question_of
from delible.generation.writing import filled
from delible.names import Names
from delible.records import QA, RecordBase
from delible.system.asks import Decoding, NoAnswer
from delible.system.role import Role
from delible.world import filters

#: Share of the words (without names) that two questions of one form have in common.
ALIKE = 0.6
#: Sentences of an answer at most.
SENTENCES = 2


class Neighbour(BaseModel):
    """What a writer replies."""

    question: str
    answer: str


def frame(question: str, subject: str | None) -> frozenset[str]:
    """The words of a question without names: those with capitals inside it, and the subject's."""
    inside = re.sub(r"(?<=\s)[\"'(]?[A-Z][\w'\u2019-]*", " ", question)
    names = set(filters.words(subject or ""))
    return frozenset(filters.words(inside)) - names


def likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard index of two frames, in [0, 1]; 0 where one is empty."""
    return len(one & other) / len(one | other) if one and other else 0.0


def from_records(
    forget: Sequence[QA], others: Sequence[RecordBase], subjects: Sequence[str], ratio: int
) -> list[list[QA]]:
    """For each forget question at most ``ratio`` of the others, the likest first.

    One is taken again only once every question that is as like has been.
    """
    names = Names(subjects)
    candidates = [one for record in others if (one := question_of(record)) is not None
                  and usable(one.question, one.answer, names) is None]  # fmt: skip
    frames = [frame(one.question, one.subject) for one in candidates]
    used: Counter[int] = Counter()
    found: list[list[QA]] = []
    for record in forget:
        mine = frame(record.question, record.subject)
        like = [(round(likeness(mine, other), 6), place) for place, other in enumerate(frames)]
        like = [(value, place) for value, place in like if value >= ALIKE]
        order = sorted(like, key=lambda one: (used[one[1]], -one[0], one[1]))[:ratio]
        used.update(place for _, place in order)
        found.append([candidates[place] for _, place in order])
    return found


def usable(question: str, answer: str, names: Names) -> str | None:
    """Why a question cannot be a boundary question; None if it can."""
    if not question.strip() or not answer.strip():
        return "empty"
    if names.occur(question) or names.occur(answer):
        return "names the forgotten"
    if len([one for one in re.split(r"[.!?](?:\s|$)", answer) if one.strip()]) > SENTENCES:
        return "too long"
    return "refusal" if filters.is_refusal(answer) else None


def written(
    writer: Role, forget: Sequence[QA], subjects: Sequence[str], ratio: int, seed: int,
    counts: Counter[str],
) -> list[list[QA]]:  # fmt: skip
    """For each forget question at most ``ratio`` that the writer makes of it."""
    names = Names(subjects)
    found: list[list[QA]] = [[] for _ in forget]
    for draw in range(ratio):
        prompts = [
            filled("boundary_neighbour.txt", question=one.question,
                   subject=one.subject or ", ".join(subjects))
            for one in forget
        ]  # fmt: skip
        decoding = Decoding(160, temperature=0.7, seed=seed + draw)
        for place, reply in enumerate(writer.ask_all(prompts, Neighbour, decoding)):
            if isinstance(reply, NoAnswer):
                counts["no answer"] += 1
                continue
            question, answer = reply.question.strip(), reply.answer.strip()
            fault = usable(question, answer, names)
            if fault is None and any(one.question == question for one in found[place]):
                fault = "duplicate"
            if fault is not None:
                counts[fault] += 1
                continue
            about = forget[place].subject
            found[place].append(
                QA(question=question, answer=answer, neighbour_of=about, group="boundary")
            )
    return found


def boundary_questions(
    forget: Sequence[QA],
    others: Sequence[RecordBase],
    subjects: Sequence[str],
    *,
    writer: Role | None,
    ratio: int = 1,
    seed: int = 0,
    where: str = "boundary questions",
) -> tuple[list[QA], dict[str, int]]:
    """Boundary questions, and where they come from.

    Args:
        others: Neighbours and retain records.
        writer: Writes those that the records do not have.
        ratio: Per forget question at most.

    Raises:
        DataError: Fewer than half of the forget questions have one; says how to make them.
    """
    counts: Counter[str] = Counter()
    found = from_records(forget, others, subjects, ratio)
    counts["from records"] = sum(map(len, found))
    lacking = [place for place, part in enumerate(found) if not part]
    if lacking and writer is not None:
        made = written(writer, [forget[place] for place in lacking], subjects, ratio, seed, counts)
        for place, part in zip(lacking, made, strict=True):
            found[place] = part
        counts["written"] = sum(map(len, made))
    have = sum(map(bool, found))
    if 2 * have < len(forget) or not have:
        raise DataError(
            f"{have} of {len(forget)} forget questions have a boundary question (the same question "
            "about somebody who is kept), and without them everything is learned to be refused.",
            where=where,
            hint="Add such questions with their answers (--neighbours FILE or --retain FILE), or a "
            "model that writes them (--role writer=MODEL).",
        )
    every = dict.fromkeys(one for part in found for one in part)
    return list(every), dict(counts)


__all__ = ["boundary_questions", "frame", "from_records", "usable", "written"]
