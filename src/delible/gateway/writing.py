"""What clients are sent: completions of conversations and of texts, whole or in events.

A stream begins with the role, ends each answer with one chunk that says why, tells the usage
exactly when that was asked for, and then says ``[DONE]``. One that failed says so, and no
``[DONE]``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from delible.gateway.errors import CallFailed
from delible.gateway.reading import Asked
from delible.messages import ToolCall
from delible.system.replies import Piece, Reply, TokenLogprob, ToolCallPiece, Usage

#: What keeps a connection alive while there is nothing to say.
COMMENT = b": keep-alive\n\n"


def packed(content: Any) -> bytes:
    """JSON without blanks."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + packed(content) + b"\n\n"


class Writer(Protocol):
    """How a route's answers are written."""

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        """The body of answers that are whole."""
        ...

    def opening(self) -> bytes:
        """What a stream says before the first text."""
        ...

    def piece(self, index: int, piece: Piece) -> bytes:
        """A part of an answer."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """What a stream says after all answers have ended."""
        ...

    def failed(self, failed: CallFailed) -> bytes:
        """What a stream says instead of going on."""
        ...


class _Completions:
    """What both kinds of completions have in common.

    Args:
        asked: The call.
        undisclosed: An answer that a guard took back ends with ``stop``.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, asked: Asked, *, undisclosed: bool) -> None:
        self.asked, self.undisclosed = asked, undisclosed
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created}
        return {**about, "model": self.asked.model.name}

    def _finish(self, finish: str | None) -> str | None:
        return "stop" if finish == "content_filter" and self.undisclosed else finish

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        more = {"usage": None} if self.asked.with_usage else {}
        return event({**self._head(self.chunk_kind), "choices": choices, **more})

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._said(reply),
                "logprobs": self._logs(reply.logprobs if self._logged(reply.finish) else None),
                "finish_reason": self._finish(reply.finish),
            }
            for index, reply in enumerate(replies)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": counts(usage)}

    def piece(self, index: int, piece: Piece) -> bytes:
        found = b""
        delta = self._delta(piece)
        logs = piece.logprobs if self._logged(piece.finish) else ()
        if delta is not None or logs:
            choice = {"index": index, **(delta or self._nothing()), "finish_reason": None}
            if self.asked.logprobs:
                choice["logprobs"] = self._logs(logs)
            found = self._chunk([choice])
        if piece.finish is not None:
            end = {"finish_reason": self._finish(piece.finish)}
            found += self._chunk([{"index": index, **self._nothing(), **end}])
        return found

    def closing(self, usage: Usage) -> bytes:
        told = b""
        if self.asked.with_usage:
            about = {"choices": [], "usage": counts(usage)}
            told = event({**self._head(self.chunk_kind), **about})
        return told + b"data: [DONE]\n\n"

    def failed(self, failed: CallFailed) -> bytes:
        return event(failed.content())

    def _logged(self, finish: str | None) -> bool:
        # those of a text that nobody may read would tell it
        return self.asked.logprobs and finish != "content_filter"

    def _said(self, reply: Reply) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        raise NotImplementedError

    def _nothing(self) -> dict[str, Any]:
        raise NotImplementedError

    def _logs(self, logs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        raise NotImplementedError


class Chat(_Completions):
    """Completions of conversations."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        """The role of every answer."""
        return b"".join(
            self._chunk(
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "finish_reason": None,
                    }
                ]
            )
            for index in range(len(self.asked.prompts))
        )

    def _said(self, reply: Reply) -> dict[str, Any]:
        text: str | None = reply.text
        said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reply.tool_calls:
            said["content"] = text or None
            said["tool_calls"] = [_called(call) for call in reply.tool_calls]
        return {"message": said}

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.tool_calls:
            delta["tool_calls"] = [_call_piece(one) for one in piece.tool_calls]
        return {"delta": delta} if delta else None

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logs(self, logs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logs is None:
            return None
        content = [
            {
                "token": one.token,
                "logprob": one.logprob,
                "bytes": list(one.token.encode("utf-8", errors="replace")),
                "top_logprobs": [],
            }
            for one in logs
        ]
        return {"content": content, "refusal": None}


class Text(_Completions):
    """Completions of texts."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> bytes:
        """Nothing: texts have no role."""
        return b""

    def _said(self, reply: Reply) -> dict[str, Any]:
        return {"text": reply.text}

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        return {"text": piece.text} if piece.text else None

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def _logs(self, logs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logs is None:
            return None
        return {
            "tokens": [one.token for one in logs],
            "token_logprobs": [one.logprob for one in logs],
            "top_logprobs": None,
            "text_offset": None,
        }


def counts(usage: Usage) -> dict[str, int]:
    """Tokens, as completions tell them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _called(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_piece(piece: ToolCallPiece) -> dict[str, Any]:
    function = {"arguments": piece.arguments}
    if piece.name:
        function = {"name": piece.name, **function}
    about = {"id": piece.id, "type": "function"} if piece.id else {}
    return {"index": piece.index, **about, "function": function}
