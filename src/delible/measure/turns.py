"""Prompts as turns: what an attack that only asks does to a question, and to what stands before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from delible.measure.metric import Item, SystemValues
from delible.messages import Message
from delible.records import QA, Choice, Dialogue, RecordBase
from delible.system.asks import Prompt

#: A question and what was answered.
Turn = tuple[str, str]
#: ROUGE-L recall from which an answer counts where nobody classed it.
RECALLED = 0.5


def question_of(record: RecordBase) -> str | None:
    """What a record asks: its question, or the last user turn; ``None`` for running text."""
    if isinstance(record, QA | Choice):
        return record.question
    if isinstance(record, Dialogue):
        asked = [turn.text for turn in record.messages if turn.role == "user"]
        return asked[-1] if asked else None
    return None


def last_turn(prompt: Prompt) -> str | None:
    """The text of the user turn that a prompt ends in; None where it ends otherwise."""
    if prompt.text is not None or not prompt.messages or prompt.messages[-1].role != "user":
        return None
    return prompt.messages[-1].text


def ending(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text in its last turn."""
    *earlier, last = prompt.messages
    return replace(prompt, messages=(*earlier, last.with_text(text)))


def after(prompt: Prompt, turns: Iterable[Turn]) -> Prompt:
    """The prompt with turns of user and assistant before its last one."""
    *earlier, last = prompt.messages
    said = [
        message
        for question, answer in turns
        for message in (
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
    ]
    return replace(prompt, messages=(*earlier, *said, last))


def asked_as(record: RecordBase, prompt: Prompt, question: str) -> Prompt | None:
    """The prompt with the record's question in other words; None where it is not in there."""
    text, plain = last_turn(prompt), question_of(record)
    if text is None or not plain or plain not in text:
        return None
    return ending(prompt, text.replace(plain, question, 1))


def distinct(prompts: Iterable[Prompt], plain: Prompt) -> tuple[Prompt, ...]:
    """The prompts, each once, without the plain one."""
    return tuple(one for one in dict.fromkeys(prompts) if one != plain)


def right_forms(values: SystemValues, split: str) -> list[tuple[bool | None, ...]] | None:
    """Which forms of which records were answered right; None where it was not measured.

    Right is what the outcome calls correct, or else an answer with half of the gold words. What
    has no value is None; a record without any form has none.
    """
    name = next((one for one in ("outcome", "rouge_l_recall") if one in values.items), None)
    items = values.items[name].get(split) if name is not None else None
    if items is None:
        return None
    least = 1.0 if name == "outcome" else RECALLED

    def right(item: Item) -> tuple[bool | None, ...]:
        found = item.forms or ((item.value,) if item.value is not None else ())
        return tuple(None if value is None else value >= least - 1e-9 for value in found)

    return [right(item) for item in items]


def share(found: Iterable[bool | None]) -> float | None:
    """Share that is true, of what is known; None where nothing is."""
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known else None
