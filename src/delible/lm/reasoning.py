"""Answers with their reasons before them, as a chat template writes them.

Records hold ``<think>reasons</think>answer``. Some templates take the reasons from a field of
their own, some out of the content, with line breaks of their own; others know none, or drop them
from every turn that is over, though the model writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from delible.records import Message
from delible.system.asks import Prompt

_REASONED = re.compile(r"\s*<think>(?P<reasons>.+?)</think>\s*(?P<answer>.+)", re.DOTALL)


class _Reply(Message):
    """An assistant's turn whose reasons stand in a field of their own."""

    reasoning_content: str


def written(
    chat: Callable[[tuple[Message, ...]], str], before: str, prompt: Prompt, answer: str
) -> str | None:
    """The text that follows the prompt: reasons and answer; None for an answer without reasons.

    As the template writes it, where it writes the reasons at all, else as the record has it. A
    prompt that has opened the reasons already is not followed by another mark.

    Args:
        chat: The template's text of a conversation.
        before: The template's text of the prompt.
        prompt: A conversation, without a prefill.
    """
    found = _REASONED.fullmatch(answer)
    if found is None:
        return None
    reasons, said = found["reasons"].strip(), found["answer"].strip()
    for turn in (
        _Reply(role="assistant", content=said, reasoning_content=reasons),
        Message(role="assistant", content=answer),
    ):
        whole = chat((*prompt.messages, turn))
        middle, there, _ = whole.removeprefix(before).rpartition(said)
        if whole.startswith(before) and there and reasons in middle:
            return middle + said
    opened = before.rstrip().endswith("<think>")
    return answer.partition("<think>")[2] if opened else answer
