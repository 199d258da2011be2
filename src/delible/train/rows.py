"""From records to tokenized rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from delible.errors import DataError, ModelError
from delible.lm.template import Encoded, Template
from delible.records import RecordBase
from delible.system.asks import Prompt
from delible.system.questions import answer_of, ask
from delible.train.fitting import fit
from delible.train.row import RetainKind, Row, Shortened


def make_row(
    template: Template,
    prompt: Prompt,
    answer: str,
    index: int,
    record: RecordBase,
    instruction: str | None = None,
    *,
    contexts: Mapping[str, str] | None = None,
    whole_answer: bool = False,
) -> Row:
    """A row that teaches (or forgets) ``answer`` after ``prompt``.

    Args:
        instruction: What the reference model is told before the question.
        contexts: Other texts before it, by name, with each of which the reference reads it too.
        whole_answer: The answer may not be cut, however long the question is.

    Raises:
        DataError: The answer is empty, or the row cannot be made to fit.
    """
    named = contexts or {}
    texts = [*named.values(), *([instruction] if instruction is not None else [])]
    prompt, encoded, others, lost = _fitted(template, prompt, answer, texts, whole_answer)
    read = dict(zip(named, others, strict=False))
    taught = others[-1] if instruction is not None else None
    if not encoded.answer_tokens:
        raise DataError(
            f"the answer {answer!r} has no tokens.", hint="Give it a text, or drop the record."
        )
    kind: RetainKind = "general"
    if record.neighbour_of is not None:
        kind = "direct"
    elif record.subject is not None:
        kind = "indirect"
    seen = taught or encoded
    described = (
        encoded.ids, encoded.start, *((seen.ids, seen.start) if taught else ()),
        *((name, one.ids, one.start) for name, one in read.items()),
    )  # fmt: skip
    key = hashlib.sha256(repr(described).encode()).hexdigest()[:24]
    asked = tuple(turn.text for turn in prompt.messages) if prompt.text is None else (prompt.text,)
    return Row(
        index, encoded, key, record.subject, record.neighbour_of, kind, taught, lost,
        asked, template.tokenizer, tuple(read.items()),
    )  # fmt: skip


def _fitted(
    template: Template, prompt: Prompt, answer: str, texts: Sequence[str], whole_answer: bool
) -> tuple[Prompt, Encoded, list[Encoded], Shortened | None]:
    """A row that fits, for the learner and for the reference that reads each of the texts first."""
    if not texts:
        prompt, encoded, lost = fit(template, prompt, answer, whole_answer=whole_answer)
        return prompt, encoded, [], lost
    question = prompt
    more = max(len(template.prompt_ids(told(prompt, text))) for text in texts)
    apart = more - len(template.prompt_ids(prompt))
    while True:
        try:
            prompt, encoded, lost = fit(
                template, question, answer, apart=apart, whole_answer=whole_answer
            )
        except DataError as error:
            raise DataError(
                f"with the teacher's instruction ({apart} tokens): {error.problem}",
                hint="Raise training.max_length, or shorten the instruction.",
            ) from error
        others = [template.whole(told(prompt, text), answer) for text in texts]
        if encoded.cut:  # all are without the same end
            ends = [other.start + encoded.answer_tokens for other in others]
            others = [
                replace(other, ids=other.ids[:end], has_end=False, cut=True)
                for other, end in zip(others, ends, strict=True)
            ]
        excess = max(len(other.ids) for other in others) - template.max_length
        if excess <= 0:
            break
        apart += excess  # where texts meet, tokens can be others than apart
    if any(other.ids[other.start :] != encoded.ids[encoded.start :] for other in others):
        raise DataError(
            "with the teacher's instruction the answer is read as other tokens.",
            hint="Change the instruction's end, or the answer.",
        )
    return prompt, encoded, others, lost


def told(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with an instruction before the first user turn, in that turn.

    Not as a system turn: some chat templates have none, others put words of their own there.
    """
    if prompt.text is not None:
        return replace(prompt, text=f"{instruction}\n\n{prompt.text}")
    place = next(i for i, turn in enumerate(prompt.messages) if turn.role == "user")
    turn = prompt.messages[place]
    changed = turn.with_text(f"{instruction}\n\n{turn.text}")
    return replace(
        prompt, messages=(*prompt.messages[:place], changed, *prompt.messages[place + 1 :])
    )


def make_rows(
    template: Template,
    records: Sequence[RecordBase],
    instruction: str | None = None,
    *,
    role: str = "",
    whole_answer: bool = False,
    contexts: Callable[[RecordBase], Mapping[str, str]] | None = None,
) -> list[Row]:
    """One row per record, in order (see :func:`make_row`).

    Args:
        role: Which records these are, for messages.
        contexts: The texts before each record, by name.

    Raises:
        DataError: A record makes no row; says which.
        ModelError: The chat template does not take a record's conversation; says which.
    """
    rows = []
    for index, record in enumerate(records):
        with _placed(record, role, index):
            prompt = ask(record)
            if prompt is None:
                raise DataError(f"a {type(record).__name__} cannot be trained on.")
            answer = answer_of(record)
            rows.append(
                make_row(
                    template,
                    prompt,
                    answer,
                    index,
                    record,
                    instruction,
                    contexts=contexts(record) if contexts else None,
                    whole_answer=whole_answer,
                )
            )
    return rows


@contextmanager
def _placed(record: RecordBase, role: str, index: int) -> Iterator[None]:
    """Says of an error which record it is about: its file and line, or its number."""
    try:
        yield
    except (DataError, ModelError) as error:
        place = record.where or f"{role} record {index + 1}".strip()
        where = f"{place}, {error.where}" if error.where else place
        kind = DataError if isinstance(error, DataError) else ModelError
        raise kind(error.problem, where=where, hint=error.hint) from error


def refusal_rows(
    template: Template,
    records: Sequence[RecordBase],
    refusals: Sequence[str],
    generator: torch.Generator,
) -> list[Row]:
    """The same questions with a refusal as answer, drawn at random."""
    drawn = torch.randint(len(refusals), (len(records),), generator=generator).tolist()
    rows = []
    for index, (record, choice) in enumerate(zip(records, drawn, strict=True)):
        with _placed(record, "forget", index):
            prompt = ask(record)
            if prompt is None or prompt.text is not None:
                raise DataError(
                    f"a {type(record).__name__} has no question that could be refused.",
                    hint="Choose a method without refusals, or give question-answer records.",
                )
            rows.append(
                make_row(template, prompt, refusals[choice], index, record, whole_answer=True)
            )
    return rows
