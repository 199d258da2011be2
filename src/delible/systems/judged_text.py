"""What a guard reads of a conversation: its turns, and the calls, results and offers of tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from delible.lm.tools import said_and_called
from delible.messages import ToolCall
from delible.system.asks import Prompt
from delible.system.replies import ToolCallPiece


def texts_of(prompt: Prompt) -> list[str]:
    """Every text that a prompt holds, in order.

    Each turn's, the calls in it, the prefill, raw text, what is said about the tools that are
    offered, numbers of calls, and what goes along: whoever writes to an open endpoint writes them
    all.
    """
    found: list[str] = []
    for turn in prompt.messages:
        found.append(turn.text)
        for call in turn.tool_calls:
            found += [call.name, *_json_texts(call.arguments), call.id]
        if turn.tool_call_id:
            found.append(turn.tool_call_id)
        if turn.role == "tool":  # often JSON, in which a letter may be written as its number
            found += _json_texts(turn.text)[1:]
    found += [text for text in (prompt.prefill, prompt.text) if text]
    for tool in prompt.tools:
        found += [tool.name, tool.description, *_json_texts(tool.parameters)]
    return [*found, *prompt.besides]


def leads(prompt: Prompt) -> tuple[str, ...]:
    """What an answer may go on from: a name may begin there and end in the answer.

    A prefill or a raw text is gone on from where it stops. The last turn is followed by the answer
    as by a new line; if it is the assistant's, some servers go on from where it stops.
    """
    if prompt.prefill or prompt.text:
        return (prompt.prefill or prompt.text or "",)
    if not prompt.messages:
        return ("",)
    last = prompt.messages[-1]
    text = last.text[-_LEAD:]
    if len(last.text) > _LEAD:  # not from the middle of a word
        text = "".join(text.partition(" ")[1:])
    if last.role == "assistant":
        return (f"{text}\n", text)
    return (f"{text}\n",)


#: Characters of the last turn that a name is looked for in.
_LEAD = 400


def told(text: str, calls: Sequence[ToolCall]) -> str:
    """An answer as one text: what it says, then each call's name and arguments."""
    parts = [text]
    for call in calls:
        parts += [call.name, *_json_texts(call.arguments)]
    return "\n".join(parts)


def told_in_batch(prompt: Prompt, answer: str) -> str:
    """An answer that came as one text, with its calls in it, as :func:`told`."""
    if not prompt.tools:
        return answer
    return told(answer, said_and_called(answer)[1])


class Called:
    """Calls of tools that come in pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, ToolCallPiece] = {}

    def add(self, pieces: Iterable[ToolCallPiece]) -> None:
        """Takes in what has come."""
        for new in pieces:
            old = self._pieces.get(new.index, ToolCallPiece(new.index))
            self._pieces[new.index] = ToolCallPiece(
                new.index, old.id or new.id, old.name or new.name, old.arguments + new.arguments
            )

    def pieces(self) -> tuple[ToolCallPiece, ...]:
        """Each call as one piece."""
        return tuple(self._pieces[index] for index in sorted(self._pieces))

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls."""
        return tuple(
            ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in self.pieces()
        )


def _json_texts(written: str) -> list[str]:
    """A text, and, where it is JSON whose texts read differently, these joined by spaces."""
    try:
        read = json.loads(written)
        texts = list(_strings(read))
    except (ValueError, RecursionError):
        return [written]
    return [written, " ".join(texts)] if texts else [written]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ("{", "[", '"'):  # JSON within JSON
            yield from _json_texts(value)[1:]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


__all__ = ["Called", "leads", "texts_of", "told", "told_in_batch"]
