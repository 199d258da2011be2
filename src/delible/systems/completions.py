"""What an OpenAI-compatible server is told, and what it says: an answer, a failure, or to wait.

Servers report failures in several ways: a status, an ``error`` in a reply with status 200, a
broken body. And reasoning models answer in several ways: the thoughts stand in the text between
``<think>`` and ``</think>``, or in a field of their own. Both become one form here: the text as
the model wrote it, thoughts first. A thought that was cut off is no answer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from delible.messages import ImagePart, Message, ToolCall
from delible.system.asks import Decoding, Prompt
from delible.system.replies import FinishReason, Reply, TokenLogprob, ToolCallPiece, Usage
from delible.systems.thoughts import (
    CUT_THOUGHT,
    THINK,
    THOUGHT,
    is_cut_thought,
    parted,
    settled,
)

#: Failures that may pass: timeouts, conflicts, rate limits; and every server error.
PASSING = (408, 409, 425, 429)
#: What a rate limit is called that no waiting lifts.
SPENT = "insufficient_quota"
#: Fields in which servers put thoughts.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Ends other than by itself.
_FINISHES: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}


class CallError(Exception):
    """A call without an answer.

    Args:
        reason: Why, for people.
        status: The HTTP status, if there was one.
        again: Whether another attempt may succeed.
        wait: Seconds that the server asks to wait.
        thinking: Whether the answer was cut off before it began, in its thoughts.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        *,
        again: bool = False,
        wait: float = 0.0,
        thinking: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.again, self.wait = reason, status, again, wait
        self.thinking = thinking


def may_pass(status: int | None, text: str) -> bool:
    """Whether another attempt may succeed after this status (None: unknown)."""
    return SPENT not in text and (status is None or status in PASSING or status >= 500)


def turn(message: Message) -> dict[str, Any]:
    """A turn as servers take it."""
    content: Any = message.content
    if not isinstance(content, str):
        content = [
            {"type": "image_url", "image_url": {"url": part.data_url()}}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in content
        ]
    found: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def tools(prompt: Prompt) -> dict[str, Any]:
    """The fields that offer a prompt's tools."""
    if not prompt.tools:
        return {}
    choice: Any = prompt.tool_choice
    if choice not in (None, "auto", "none", "required"):
        choice = {"type": "function", "function": {"name": choice}}
    found: dict[str, Any] = {"tools": [tool.declared() for tool in prompt.tools]}
    return found if choice is None else {**found, "tool_choice": choice}


class Heard:
    """A completion of either kind as it comes: whole, or in the events of a stream.

    Args:
        streamed: Whether it comes in events, of which some say nothing.
    """

    def __init__(self, *, streamed: bool = False) -> None:
        self.streamed, self.ended, self.usage = streamed, "", Usage()
        self.logprobs: list[TokenLogprob] = []
        self._content: str | None = None
        self._refusal = self._thoughts = ""
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, content: Any) -> tuple[ToolCallPiece, ...]:
        """Hears one reply or event; returns what it adds to calls of tools.

        Raises:
            CallError: It is none, or tells of a failure.
        """
        try:
            self.usage = _usage(content.get("usage")) or self.usage
            if self.streamed and not content.get("choices"):
                return ()
            choice = content["choices"][0]
            message = choice.get("delta" if "delta" in choice else "message")
            text = message.get("content") if message is not None else choice.get("text")
            if message is None and "text" not in choice and not self.streamed:
                raise KeyError("text")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise CallError("the reply is not a completion") from None
        if choice.get("error"):
            raise _told(choice["error"])
        if isinstance(text, list):  # parts, as some servers send them
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if isinstance(text, str):
            self._content = (self._content or "") + text
        self.ended = choice.get("finish_reason") or self.ended
        self.logprobs += _logprobs(choice.get("logprobs"))
        if message is None:
            return ()
        self._refusal += message.get("refusal") or ""
        thoughts = (message.get(name) for name in REASONING)
        self._thoughts += next((one for one in thoughts if isinstance(one, str) and one), "")
        listed = message.get("tool_calls")
        calls = [one for one in listed or () if isinstance(one, dict)]
        return tuple(self._called(place, call) for place, call in enumerate(calls))

    def _called(self, place: int, call: Mapping[str, Any]) -> ToolCallPiece:
        index, function = call.get("index", place), call.get("function") or {}
        known = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):  # as an object, against the rule
            arguments = json.dumps(arguments)
        named = {"id": call.get("id"), "name": function.get("name")}
        new = {key: "" if known[key] else str(one or "") for key, one in named.items()}
        new["arguments"] = arguments
        for key, one in new.items():
            known[key] += one
        return ToolCallPiece(index, **new)

    @property
    def text(self) -> str:
        """The text so far, thoughts first."""
        said, thoughts = self._content or self._refusal, self._thoughts.strip()
        if not thoughts:
            return said
        return f"{THINK}\n{thoughts}" + (f"\n{THOUGHT}\n\n{said}" if said.strip() else "")

    def reply(self) -> Reply:
        """The whole answer, as the model wrote it.

        One that the server's own filter withheld is empty, and says so by its finish.

        Raises:
            CallError: There is none. An empty text is one, unless it was cut off before it began.
        """
        said = self._content or self._refusal
        answered = bool(said.strip()) or bool(self._calls)
        if (self._thoughts.strip() and not answered) or is_cut_thought(said):
            raise CallError(CUT_THOUGHT, thinking=True)
        if not answered and self.ended == "content_filter":
            return Reply("", "content_filter", self.usage)
        # models that think in secret use up the limit and show nothing
        if not answered and (self._content is None or (not said and self.ended == "length")):
            reason = f"the reply has no text (finish reason '{self.ended or None}')"
            raise CallError(reason, thinking=self.ended == "length")
        calls = tuple(ToolCall(**self._calls[index]) for index in sorted(self._calls))
        finish = "tool_calls" if calls and self.ended != "length" else _FINISHES.get(self.ended)
        logprobs = tuple(self.logprobs) or None
        return Reply(self.text, finish or "stop", self.usage, calls, logprobs)


def _usage(told: Any) -> Usage | None:
    if not isinstance(told, dict):
        return None
    counts = (told.get("prompt_tokens"), told.get("completion_tokens"))
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))


def _logprobs(told: Any) -> list[TokenLogprob]:
    """Of a chat completion (a list of tokens), or of a text's (lists side by side)."""
    if not isinstance(told, dict):
        return []
    pairs = [(one.get("token"), one.get("logprob")) for one in told.get("content") or ()]
    pairs += zip(told.get("tokens") or (), told.get("token_logprobs") or (), strict=False)
    return [TokenLogprob(str(token), float(value)) for token, value in pairs if value is not None]


def spoken(text: str, prompt: Prompt, decoding: Decoding, *, done: bool = True) -> str:
    """An answer as systems give it: without a prefill that servers repeat, cut before stop texts.

    Args:
        done: Whether it is whole; else only what stays as it is whatever follows.
    """
    thoughts, answer = parted(text)
    if prompt.prefill and answer.startswith(prompt.prefill):
        answer = answer.removeprefix(prompt.prefill)
    elif not done and prompt.prefill.startswith(answer):
        answer = ""
    for one in decoding.stop:
        answer = answer.partition(one)[0]
    text = thoughts + answer
    return text.strip() if done else settled(text, decoding.stop)


async def events(chunks: AsyncIterable[bytes], longest: int) -> AsyncIterator[str]:
    """The data of server-sent events; they end with ``[DONE]``, which is not given.

    Lines are split as bytes: texts hold separators of Unicode that are no ends of a line here.

    Args:
        longest: Bytes of one event at most.

    Raises:
        CallError: The stream ended before that, or an event is too long.
    """
    pending, data = bytearray(), list[bytes]()
    async for chunk in chunks:
        pending += chunk
        if len(pending) + sum(map(len, data)) > longest:
            raise CallError(f"an event is longer than {longest:,} bytes")
        if b"\n" not in chunk:
            continue
        *lines, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for line in (one.removesuffix(b"\r") for one in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                whole = b"\n".join(data).decode(errors="replace")
                if whole == "[DONE]":
                    return
                yield whole
                data.clear()
    raise CallError("the answer broke off", again=True)


def check_error(content: Any) -> None:
    """Finds the failure in a reply whose status says that all is well.

    Raises:
        CallError: There is one.
    """
    if isinstance(content, dict) and content.get("error") and not content.get("choices"):
        raise _told(content["error"])


def _told(error: Any) -> CallError:
    code = error.get("code") if isinstance(error, dict) else None
    number = str(code) if re.fullmatch(r"[45]\d\d", str(code)) else None
    status = int(number) if number else None
    text = json.dumps(error)
    reason = f"the server says {number or 'error'}: {complaint(text)}"
    return CallError(reason, status, again=may_pass(status, text))


def complaint(text: str) -> str:
    """What an error reply says, in its own words."""
    try:
        content = json.loads(text)
    except ValueError:
        return text
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)


def wanted_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait: a number, a date, or milliseconds."""
    try:
        if told := headers.get("retry-after-ms"):
            return max(0.0, float(told) / 1000)
        told = headers.get("retry-after", "0")
        if re.fullmatch(r"\s*\d+(\.\d*)?\s*", told):
            return float(told)
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
