"""Multiple choice: prompts with options in any order, and reading letters. No metric lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from delible.measure.scoring.text import content_log_probabilities, continuing, token_scores
from delible.records import Choice
from delible.system.asks import Answer, Prompt, Score
from delible.system.questions import LETTERS, ask

#: A chat turn that asks for the letter, or plain text that ends in "Answer:".
Style = Literal["chat", "plain"]
#: The order of the options: as they are, or every cyclic one.
Orders = Literal["given", "cyclic"]


def option_lines(options: Sequence[str]) -> str:
    """The options with their letters, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def letter_prompt(record: Choice, style: Style, description: str = "") -> Prompt:
    """The question with its options, asked for the letter.

    Args:
        record: The question.
        style: See :data:`Style`.
        description: A first line of the plain form, such as what the questions are about.
    """
    if style == "chat":
        prompt = ask(record)
        if prompt is None:  # for the type checker: a choice is always asked
            raise TypeError("a choice without a prompt")
        return prompt
    head = f"{description}\n\n" if description else ""
    return Prompt(text=f"{head}{record.question}\n{option_lines(record.options)}\nAnswer:")


def rotated(record: Choice, prompt: Prompt, steps: int) -> tuple[Prompt, int] | None:
    """A prompt with its options moved up cyclically, and the new place of the right one.

    Args:
        record: The question.
        prompt: A prompt that lists the options of the record, perhaps changed by an attack.
        steps: Places to move by; 0 is the prompt itself.

    Returns:
        ``None`` when the prompt does not list the options.
    """
    count = len(record.options)
    if steps % count == 0:
        return prompt, record.correct
    before = option_lines(record.options)
    steps %= count
    after = option_lines(record.options[steps:] + record.options[:steps])
    correct = (record.correct - steps) % count
    if prompt.text is not None:
        if before not in prompt.text:
            return None
        return replace(prompt, text=prompt.text.replace(before, after)), correct
    if not any(before in message.text for message in prompt.messages):
        return None
    messages = tuple(
        message.with_text(message.text.replace(before, after)) for message in prompt.messages
    )
    return replace(prompt, messages=messages), correct


def all_orders(record: Choice, prompt: Prompt, orders: Orders) -> list[tuple[Prompt, int]]:
    """The prompt in every order that is asked, with the place of the right option in each.

    Returns:
        Empty when the options must be moved and the prompt does not list them.
    """
    steps = range(len(record.options) if orders == "cyclic" else 1)
    found = [rotated(record, prompt, step) for step in steps]
    return [one for one in found if one is not None] if None not in found else []


def letter_scores(record: Choice, prompt: Prompt) -> list[Score]:
    """One request per letter."""
    return [Score(prompt, continuing(prompt, letter)) for letter in LETTERS[: len(record.options)]]


def text_log_probability(answer: Answer) -> float:
    """log P of a text, nats: the sum over its tokens without the end-of-turn token.

    Returns:
        A value in [-inf, 0]; not a number without tokens.
    """
    logprobs = content_log_probabilities(token_scores(answer))
    return float(logprobs.sum()) if logprobs.size else float("nan")


def most_likely(logs: npt.NDArray[np.float64]) -> int | None:
    """Index of the largest value, the first of equals; ``None`` where it cannot be said."""
    if np.isnan(logs).any() or not np.isfinite(logs).any():
        return None
    return int(logs.argmax())
