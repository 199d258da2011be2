"""Where a subject stands in a question, as tokens: the place whose key an edit is about.

A subject is never tokenized alone: what stands around it decides how it is cut into tokens, and
whether a space belongs to it. The whole prompt is tokenized, and offsets tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from delible.errors import DataError, ModelError
from delible.names import UNSPACED
from delible.system.asks import Prompt

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Stands for a name, or a question, while a template is rendered.
MARK = "\u2063name\u2063"


@dataclass(frozen=True)
class Located:
    """A subject in a question that is asked.

    Attributes:
        ids: Token ids of the whole prompt.
        first: Index of the token with the subject's first letter.
        last: Index of the last token with its last letter.
        times: How often the question names it; the last time counts.
    """

    ids: tuple[int, ...]
    first: int
    last: int
    times: int


def occurrences(text: str, subject: str, others: Iterable[str] = ()) -> list[tuple[int, int]]:
    """Where a text names a subject: whole words in any case, (start, end) in order.

    Args:
        text: The text.
        subject: The name.
        others: Names of others. Where a longer one of them stands, nothing in it is the subject.
    """
    known = " ".join(subject.split()).casefold()
    longer = [
        match.span()
        for other in others
        if len(" ".join(other.split())) > len(known) and known in " ".join(other.split()).casefold()
        for match in _pattern(other).finditer(text)
    ]
    return [
        (start, end)
        for start, end in (match.span() for match in _pattern(subject).finditer(text))
        if not any(first <= start and end <= last for first, last in longer)
    ]


def _pattern(name: str) -> re.Pattern[str]:
    """Whole words; an edge in a script without spaces may stand beside anything."""
    words = name.split()
    before = "" if UNSPACED.match(words[0][0]) else r"(?<!\w)"
    after = "" if UNSPACED.match(words[-1][-1]) else r"(?!\w)"
    return re.compile(before + r"\s+".join(map(re.escape, words)) + after, re.IGNORECASE)


def locate(
    lm: LM,
    question: str,
    subject: str,
    *,
    others: Iterable[str] = (),
    within: tuple[int, int] | None = None,
) -> Located:
    """Where a question names a subject, in the model's chat template.

    Args:
        lm: The model.
        question: As the user asks it.
        subject: The name.
        others: Names of others, see :func:`occurrences`.
        within: Characters of the question that count; None: all.

    Raises:
        DataError: The question does not name the subject, or only as a part of another one.
        ModelError: The template rewrites the question, or the tokenizer does not tell.
    """
    start, end = within or (0, len(question))
    spans = [
        (first + start, last + start)
        for first, last in occurrences(question[start:end], subject, others)
    ]
    if not spans:
        inside = bool(occurrences(question[start:end], subject))
        raise DataError(
            f"the question {question!r} "
            + (
                f"names '{subject}' only as a part of another subject."
                if inside
                else f"does not name its subject '{subject}'."
            ),
            hint="Give each forget record the subject as its question writes it.",
        )
    prompt = Prompt.ask(question)
    text = lm.template.render(prompt)
    before = _before(lm, Prompt.ask(MARK), question, text, f"the question {question!r}")
    first, last = spans[-1]
    ids = tuple(lm.template.prompt_ids(prompt))
    special = not lm.template.has_chat
    start_token = _first_token(lm, ids, text, before + first, special)
    end_token = _last_token(lm, ids, text, before + last - 1, special)
    if start_token is None or end_token is None:
        raise _unclear(lm, subject)
    return Located(ids, start_token, end_token, len(spans))


def cut_after_name(lm: LM, name: str, context: Callable[[str], Prompt]) -> list[int]:
    """Token ids of a context up to the last token of a name in it, and no further.

    What follows a token cannot change its state in a causal model, but it can change how the
    name is tokenized, so the whole context is tokenized and then cut.

    Args:
        name: The name.
        context: Puts a name into a prompt.

    Raises:
        ModelError: The chat template rewrites the name, or the tokenizer does not tell where it
            ends.
    """
    prompt = context(name)
    text = lm.template.render(prompt)
    before = _before(lm, context(MARK), name, text, f"the name '{name}'")
    ids = tuple(lm.template.prompt_ids(prompt))
    # As in Template: a chat template writes its own beginning-of-text token.
    special = prompt.text is not None or not lm.template.has_chat
    end = _last_token(lm, ids, text, before + len(name) - 1, special)
    if end is None:
        raise _unclear(lm, name)
    return list(ids[: end + 1])


def _before(lm: LM, marked: Prompt, put: str, text: str, what: str) -> int:
    """How many characters of a rendered text stand before what was put in place of the mark."""
    before, found, after = lm.template.render(marked).partition(MARK)
    if not found or before + put + after != text:
        raise ModelError(
            f"the chat template does not keep {what} as it is.",
            hint="Use a tokenizer whose template puts the user's words in verbatim.",
        )
    return len(before)


def _unclear(lm: LM, name: str) -> ModelError:
    return ModelError(
        f"the tokenizer does not tell which tokens the name '{name}' begins and ends with.",
        where=type(lm.tokenizer).__name__,
        hint="Write the name as the model would, or use the model's fast tokenizer.",
    )


def _first_token(lm: LM, ids: Sequence[int], text: str, place: int, special: bool) -> int | None:
    """Index of the token with the character at a place, the first of several; None when unclear."""
    if getattr(lm.tokenizer, "is_fast", False):
        covering = _covering(lm, ids, text, place, special)
        return covering[0] if covering else None
    # a space before a word belongs to it
    return _known(lm, ids, text[:place].rstrip(" "), special)


def _last_token(lm: LM, ids: Sequence[int], text: str, place: int, special: bool) -> int | None:
    """Index of the token with the character at a place, the last of several; None when unclear."""
    if getattr(lm.tokenizer, "is_fast", False):
        covering = _covering(lm, ids, text, place, special)
        return covering[-1] if covering else None
    count = _known(lm, ids, text[: place + 1], special)
    return count - 1 if count else None


def _covering(lm: LM, ids: Sequence[int], text: str, place: int, special: bool) -> list[int]:
    """Indices of the tokens of a character (several if it has several bytes)."""
    encoding = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    if tuple(encoding["input_ids"])[: len(ids)] != tuple(ids):
        return []
    spans = list(encoding["offset_mapping"])[: len(ids)]
    return [index for index, (start, end) in enumerate(spans) if start <= place < end]


def _known(lm: LM, ids: Sequence[int], head: str, special: bool) -> int | None:
    """How many tokens a text's beginning has; None if the text's tokens do not begin with them."""
    found = list(lm.tokenizer(head, add_special_tokens=special)["input_ids"])
    if special and found and found[-1] == lm.tokenizer.eos_token_id:
        found.pop()
    return len(found) if tuple(ids[: len(found)]) == tuple(found) else None


def sharing_last_token(lm: LM, names: Sequence[str], kept: Sequence[str]) -> dict[str, list[str]]:
    """Kept subjects that end with the same token as a name, by name; edits of it hit them too."""

    def last(name: str) -> int:
        return cut_after_name(lm, name, lambda put: Prompt.ask(f"Tell me about {put}."))[-1]

    ends = {name: last(name) for name in dict.fromkeys((*names, *kept))}
    shared = {
        name: [other for other in kept if other != name and ends[other] == ends[name]]
        for name in names
    }
    return {name: others for name, others in shared.items() if others}
