"""How a record is asked: the one place that turns records into prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from delible.errors import DataError
from delible.messages import ImagePart, TextPart
from delible.records import QA, Choice, Dialogue, Passage, RecordBase
from delible.system.asks import Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ask(record: RecordBase) -> Prompt | None:
    """The prompt of a record; ``None`` for a kind that has no question."""
    if isinstance(record, QA):
        return shown(Prompt.ask(record.question), record.images)
    if isinstance(record, Choice):
        options = "\n".join(
            f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False)
        )
        asked = Prompt.ask(f"{record.question}\n{options}\nAnswer with the letter only.")
        return shown(asked, record.images)
    if isinstance(record, Dialogue):
        turns = record.messages
        return Prompt(messages=turns[:-1] if turns[-1].role == "assistant" else turns)
    if isinstance(record, Passage):
        return Prompt(text="")
    return None


def shown(prompt: Prompt, images: Sequence[ImagePart]) -> Prompt:
    """The prompt with pictures before the text of its last turn."""
    if not images:
        return prompt
    *earlier, last = prompt.messages
    parts = (*images, *([TextPart(text=last.text)] if last.text else []))
    return replace(prompt, messages=(*earlier, last.model_copy(update={"content": parts})))


def has_answer(record: RecordBase) -> bool:
    """Whether :func:`answer_of` gives one: false for a dialogue that waits for an answer."""
    if not isinstance(record, Dialogue):
        return True
    last = record.messages[-1]
    return last.role == "assistant" and not last.tool_calls


def answer_of(record: RecordBase) -> str:
    """The text that is learned or forgotten: the answer, the last turn, the passage.

    Raises:
        DataError: A dialogue whose last turn is not the assistant's, or calls tools; what others
            say is asked, not learned, and a call is no text.
    """
    if isinstance(record, Dialogue) and not has_answer(record):
        calls = bool(record.messages[-1].tool_calls)
        ends = "ends with a call of a tool" if calls else "does not end with an assistant turn"
        raise DataError(
            f"the dialogue {ends}, so there is no answer.",
            hint="Its last assistant turn is what is learned or forgotten: end it there.",
        )
    if isinstance(record, QA):
        return record.answer
    if isinstance(record, Choice):
        return LETTERS[record.correct]
    if isinstance(record, Dialogue):
        return record.messages[-1].text
    if isinstance(record, Passage):
        return record.text
    raise TypeError(f"no answer in {type(record).__name__}")
