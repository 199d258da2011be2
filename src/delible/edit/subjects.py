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
    covering = [
        token_at(lm, ids, text, before + place, special) for place in (first, last - 1)
    ]  # of the first letter and of the last one
    if covering[0] is None or covering[1] is None:
        raise _unclear(lm, subject)
    return Located(ids, covering[0][0], covering[1][-1], len(spans))


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
    covering = token_at(lm, ids, text, before + len(name) - 1, special)
    if covering is None:
        raise _unclear(lm, name)
    return list(ids[: covering[-1] + 1])


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


def token_at(
    lm: LM, ids: Sequence[int], text: str, place: int, special: bool
) -> tuple[int, ...] | None:
    """Indices of the tokens that cover a character of a text; None when unclear.

    Args:
        ids: Tokens of the text, or of its beginning.
        place: Index of the character; several tokens cover it when it has several bytes.
        special: The tokenizer adds its own tokens to the text.
    """
    if getattr(lm.tokenizer, "is_fast", False):
        encoding = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        covering = tuple(
            index
            for index, (start, end) in enumerate(encoding["offset_mapping"])
            if start <= place < end
        )
        same = tuple(encoding["input_ids"])[: len(ids)] == tuple(ids)
        return covering if same and covering and covering[-1] < len(ids) else None
    head = list(lm.tokenizer(text[: place + 1], add_special_tokens=special)["input_ids"])
    if special and head and head[-1] == lm.tokenizer.eos_token_id:
        head.pop()
    return (len(head) - 1,) if head and tuple(ids[: len(head)]) == tuple(head) else None


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
