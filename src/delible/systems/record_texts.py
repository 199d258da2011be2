"""What records tell a guard: what is asked, what is answered, what only answers hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from delible.errors import RecipeError, nearest
from delible.names import Names, fold
from delible.records import QA, Choice, Dialogue, ForgetRequest, Passage, RecordBase

QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|(?<!\w)['‘]([^\n'’]+)['’](?!\w)")


def questions_of(record: RecordBase) -> tuple[str, ...]:
    """The question and its other forms; a passage is its own."""
    if isinstance(record, QA):
        return (record.question, *record.paraphrases)
    if isinstance(record, Choice):
        return (record.question,)
    if isinstance(record, Dialogue):
        return tuple(turn.text for turn in record.messages if turn.role == "user")
    return (record.text,) if isinstance(record, Passage) else ()


def answers_of(record: RecordBase) -> tuple[str, ...]:
    """The right answer and its other forms; a passage is its own."""
    if isinstance(record, QA):
        return (record.answer, *record.aliases, *record.paraphrased_answers)
    if isinstance(record, Choice):
        return record.options[record.correct : record.correct + 1]
    if isinstance(record, Dialogue):
        return tuple(turn.text for turn in record.messages if turn.role == "assistant")
    return (record.text,) if isinstance(record, Passage) else ()


def kept_by(request: ForgetRequest) -> list[RecordBase]:
    """Every record that is not to be forgotten."""
    return [*request.retain, *request.neighbours, *request.holdout]


def names_of(
    request: ForgetRequest, aliases: Mapping[str, Sequence[str]], where: str
) -> dict[str, list[str]]:
    """Each target's names: the request's subjects, its forget records', and the aliases.

    Raises:
        RecipeError: An alias is given for somebody who is not a target.
    """
    named = (record.subject for record in request.forget if record.subject)
    targets = {name: [name] for name in (*request.subjects, *named)}
    for subject, others in aliases.items():
        if subject not in targets:
            raise RecipeError(
                f"aliases for '{subject}', who is not a target.",
                where=where,
                hint=nearest(subject, targets) if targets else "The request names nobody.",
            )
        targets[subject] = [*targets[subject], *others]
    return targets


def distinctive_strings(request: ForgetRequest, *, letters: int, words: int) -> list[str]:
    """Short answers and quoted titles of two or more words that only forgotten answers hold.

    A string that also occurs in a forget question, or in any record to keep, is left out.
    """
    candidates: dict[str, None] = {}
    for record in request.forget:
        for answer in answers_of(record):
            titles = ["".join(groups) for groups in QUOTED.findall(answer)]
            for text in [answer.strip(" .!\"'“”"), *titles]:
                folded = fold(text)
                if len(folded.letters) >= letters and 2 <= len(folded.words()) < words:
                    candidates[text] = None
    elsewhere = [
        text for record in kept_by(request) for text in (*questions_of(record), *answers_of(record))
    ]
    # A passage is its own question and its own answer, so its text is not "elsewhere".
    asked = [r for r in request.forget if not isinstance(r, Passage)]
    elsewhere += [text for record in asked for text in questions_of(record)]
    found = Names(candidates)
    common = {match.name for text in elsewhere for match in found.find(text)}
    return [text for text in candidates if text not in common]


__all__ = ["answers_of", "distinctive_strings", "kept_by", "names_of", "questions_of"]
