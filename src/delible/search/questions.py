"""Questions that a suffix is searched for: which ones, cut open, and where the search starts."""

from __future__ import annotations

from collections.abc import Sequence

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.search.suffix import Case, Tokens, tokens_of
from delible.system.asks import Prompt
from delible.system.questions import ask, has_answer

#: Repeated, what a search starts from.
START = " !"


def takes_suffix(prompt: Prompt) -> bool:
    """Whether the prompt ends in a user turn."""
    return prompt.text is None and bool(prompt.messages) and prompt.messages[-1].role == "user"


def asked(record: RecordBase) -> Prompt | None:
    """The record's prompt where a suffix can follow its question and it has an answer."""
    prompt = ask(record)
    open_turn = prompt is not None and takes_suffix(prompt)
    return prompt if open_turn and has_answer(record) else None


def spaced(records: Sequence[RecordBase], count: int) -> list[RecordBase]:
    """At most ``count`` of the records, evenly spaced."""
    step = max(1.0, len(records) / count)
    return [records[int(index * step)] for index in range(min(count, len(records)))]


def start_tokens(lm: LM, length: int) -> Tokens:
    """What the search starts from: :data:`START` repeated, about ``length`` tokens."""
    repeats = length
    while repeats > 1 and len(tokens_of(lm, START * (repeats - 1))) >= length:
        repeats -= 1  # a tokenizer may need several tokens for each
    return tokens_of(lm, START * repeats)


def cut_open(
    lm: LM, asks: Sequence[tuple[Prompt, str]], start: Tokens, where: str, *, ended: bool = True
) -> list[Case]:
    """Questions and answers as cases.

    Args:
        asks: Prompts with the answers that a suffix is to bring out.
        ended: Whether an answer must end after its last word.

    Raises:
        ModelError: The tokenizer does not keep a suffix apart.
    """
    cases = []
    for prompt, answer in asks:
        case = Case.cut(lm, prompt, answer, start, ended)
        if case is None:
            raise ModelError(
                "the suffix cannot be found among the tokens of a prompt.",
                where=where,
                hint="The prompt is longer than the model's context, or its chat template "
                "changes what is asked.",
            )
        cases.append(case)
    return cases
