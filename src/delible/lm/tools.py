"""Tools in a chat template's terms, and the calls that a model writes into its answer.

How tools are offered is the template's own matter, rendered by the tokenizer. How they are called
is text, in the form that the template taught the model. One form is known here:
``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes, Qwen and those trained like
them).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from delible.errors import ModelError
from delible.messages import ImagePart, Message, ToolCall

#: Where a call begins and ends.
CALL, CALLED = "<tool_call>", "</tool_call>"
_CALLS = re.compile(rf"{CALL}(.*?)(?:{CALLED}|\Z)", re.DOTALL)


def as_turn(message: Message, *, sees: bool = False, in_parts: bool = False) -> dict[str, Any]:
    """A turn as chat templates take it: arguments of calls are objects there.

    Args:
        sees: The model can be shown pictures.
        in_parts: The template takes a text as a list of parts, too.

    Raises:
        ModelError: It holds a picture, and the model sees none.
    """
    if message.images and not sees:
        raise ModelError(
            "the conversation holds a picture, and this model is given texts only.",
            hint="Ask a model that sees ('tiny-vlm', or one behind an endpoint), or leave it out.",
        )
    content: Any = message.text
    if message.images or in_parts:
        parts = [content] if isinstance(message.content, str) else message.content
        content = [
            {"type": "image"} if isinstance(part, ImagePart)
            else {"type": "text", "text": part if isinstance(part, str) else part.text}
            for part in parts
        ]  # fmt: skip
    turn: dict[str, Any] = {**message.model_dump(), "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def said_and_called(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """What an answer says, and what it calls; what is no whole call stays text.

    A call's id depends on the answer and its place in it alone.
    """
    calls: list[ToolCall] = []

    def taken(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return found[0]
        if not isinstance(name, str):
            return found[0]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        identity = hashlib.sha256(f"{len(calls)}/{text}".encode()).hexdigest()[:24]
        calls.append(ToolCall(id=f"call_{identity}", name=name, arguments=written))
        return ""

    said = _CALLS.sub(taken, text)
    return said.strip(), tuple(calls)
