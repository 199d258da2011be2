"""What a turn of a lesson does: the moves of a teacher and of a student, by a judge or by rules.

The rules read English turns by their first words and marks; a judge that is given codes them
instead, in a form that is checked, and a turn that it cannot code is coded by the rules. How far
two coders agree beyond chance is Cohen's kappa:

    kappa = (agreement - by chance) / (1 - by chance)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from delible.component import Config
from delible.generation.writing import filled
from delible.system.asks import NoAnswer
from delible.system.role import Role
from delible.teaching.items import Item
from delible.world import filters

TeacherMove = Literal[
    "explain", "example", "question", "hint", "corrective feedback", "confirm", "summarise"
]
StudentMove = Literal[
    "question", "attempt", "self-explanation", "misconception", "agreement", "off-topic"
]
TEACHER_MOVES: tuple[TeacherMove, ...] = get_args(TeacherMove)
STUDENT_MOVES: tuple[StudentMove, ...] = get_args(StudentMove)
#: Two coders agree well enough from this kappa on.
AGREE = 0.7

#: Words by which the rules know a move, the first that fits; "^": at the beginning alone.
_TEACHER: Mapping[TeacherMove, str] = {
    "corrective feedback": "^no|^not quite|^not exactly|^almost|^actually|^careful|^wrong"
    "|^incorrect|^that's not|^that is not|^that's wrong|^that is wrong|^you mix",
    "confirm": "^yes|^right|^correct|^exactly|^well done|^good|^great|^perfect|^that's right"
    "|^that is right|^that's correct|^that is correct|^very good",
    "summarise": "to sum up|in summary|in short|to summarise|to summarize|let us recap"
    "|let's recap|so far we|all in all",
    "hint": "hint|clue|think of|think about|it starts with|it begins with|it rhymes|consider",
    "example": "for example|for instance|such as|imagine|suppose|here is an example",
}
_STUDENT: Mapping[StudentMove, str] = {
    "self-explanation": "because|so that means|that means|in my own words|what i understand"
    "|i understand that|therefore",
    "agreement": "^ok|^okay|^i see|^yes|^thanks|^thank you|^got it|^understood|^i understand"
    "|^sure|^right",
}
#: Words of an agreement at most; a longer turn says more.
AGREEMENT = 8
_QUESTION = re.compile(r"\?\W*$")


def marked(text: str, words: str) -> bool:
    """Whether a text has one of the words: parted by bars, "^" before those that must begin it."""
    said = " ".join(text.casefold().replace("\u2019", "'").split()).lstrip(" \"'(")
    return any(
        re.match(rf"{re.escape(one[1:])}\b", said) if one.startswith("^")
        else re.search(rf"\b{re.escape(one)}\b", said)
        for one in words.split("|")
    )  # fmt: skip


class TeacherCode(Config):
    """What a judge says of a teacher's turn."""

    move: TeacherMove = Field(description="What the turn does above all.")


class StudentCode(Config):
    """What a judge says of a student's turn."""

    move: StudentMove = Field(description="What the turn does above all.")


def teacher_move(text: str) -> TeacherMove:
    """What a teacher's turn does, by rules; without any mark it explains."""
    found = next((move for move, words in _TEACHER.items() if marked(text, words)), None)
    return found or ("question" if _QUESTION.search(text) else "explain")


def student_move(text: str, asked: str, items: Sequence[Item] = ()) -> StudentMove:
    """What a student's turn does, by rules.

    Args:
        text: The turn.
        asked: The teacher's turn before it.
        items: What the lesson is about: a turn that says a wrong option, and not the right one, is
            a misconception.
    """
    for item in items:
        wrong = [one for place, one in enumerate(item.choice.options) if place]
        known = {*filters.words(item.choice.question), *filters.words(item.topic)}
        near = known.intersection(filters.words(f"{asked} {text}"))
        if (
            near
            and any(filters.says(text, one) for one in wrong)
            and not filters.says(text, item.key)
        ):
            return "misconception"
    if _QUESTION.search(text):
        return "question"
    for move, words in _STUDENT.items():
        short = move != "agreement" or len(text.split()) <= AGREEMENT
        if short and marked(text, words):
            return move
    said = {one for one in filters.words(text) if not filters.is_function_word(one)}
    around = {word for item in items for word in filters.words(f"{item.topic} {item.key}")}
    around.update(filters.words(asked))
    return "attempt" if said & around else "off-topic"


def coded_by(
    judge: Role, teacher: str, student: str, rules: tuple[TeacherMove, StudentMove]
) -> tuple[TeacherMove, StudentMove, int]:
    """Moves of a turn by a judge; where it gives none, by the rules.

    Returns:
        Both moves, and how many of them are the judge's.
    """
    shown = {"teacher": teacher, "student": student}
    first = judge.ask(
        filled("lesson_teacher_move.txt", moves=", ".join(TEACHER_MOVES), **shown), TeacherCode
    )
    second = judge.ask(
        filled("lesson_student_move.txt", moves=", ".join(STUDENT_MOVES), **shown), StudentCode
    )
    mine = rules[0] if isinstance(first, NoAnswer) else first.move
    theirs = rules[1] if isinstance(second, NoAnswer) else second.move
    return mine, theirs, sum(not isinstance(one, NoAnswer) for one in (first, second))


def kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Cohen's kappa of two codings of the same turns, at most 1; 0: as by chance.

    None without turns, or where both use one and the same code throughout (there is no chance to
    be better than).

    Raises:
        ValueError: They are of different lengths.
    """
    pairs = list(zip(one, other, strict=True))
    if not pairs:
        return None
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    first, second = Counter(one), Counter(other)
    chance = sum(first[code] * second[code] for code in first) / len(pairs) ** 2
    return None if chance == 1 else (agreement - chance) / (1 - chance)


__all__ = [
    "AGREE",
    "STUDENT_MOVES",
    "TEACHER_MOVES",
    "StudentMove",
    "TeacherMove",
    "coded_by",
    "kappa",
    "student_move",
    "teacher_move",
]
