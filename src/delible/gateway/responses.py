"""``/v1/responses`` for texts and without a state: what is asked, and the events that answer it.

Nothing is stored, so there is nothing to go on from: a call brings its whole conversation.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from delible.gateway.asked import ChatMessage, ChatRequest, ResponsesRequest
from delible.gateway.errors import CallFailed
from delible.gateway.models import ServedModel
from delible.gateway.reading import Asked, read_chat
from delible.gateway.settings import GatewaySettings
from delible.gateway.writing import packed
from delible.system.replies import Piece, Reply, Usage

#: Fields that ask for what is done anyway.
_HARMLESS = ("include", "truncation", "prompt_cache_key", "max_tool_calls", "top_logprobs")


def read_responses(body: ResponsesRequest, model: ServedModel, settings: GatewaySettings) -> Asked:
    """The conversation of a call, as one of ``/v1/chat/completions``.

    Raises:
        CallFailed: It needs a state, tools, or something besides texts.
    """
    for name in ("previous_response_id", "conversation", "background", "tools"):
        if getattr(body, name):
            raise CallFailed(
                400,
                f"'{name}' is not served: a response here is a text, and is not stored.",
                code="unsupported",
                param=name,
            )
    turns = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        turns.append({"role": "user", "content": body.input})
    else:
        turns += [_turn(one, place) for place, one in enumerate(body.input)]
    fields: dict[str, Any] = {
        name: value for name, value in body.unknown.items() if name not in _HARMLESS
    }
    if effort := (body.reasoning or {}).get("effort"):
        fields["reasoning_effort"] = effort
    if (format_ := (body.text or {}).get("format")) is not None:
        fields["response_format"] = _format(format_)
    known = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_completion_tokens": body.max_output_tokens,
        "stream": body.stream,
        "seed": body.seed,
    }
    try:
        messages = [ChatMessage.model_validate(turn) for turn in turns]
        chat = ChatRequest.model_validate({**fields, **known, "messages": messages})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CallFailed(400, f"{where}: {first['msg']}", param="input") from None
    return read_chat(chat, model, settings)


def _turn(item: Mapping[str, Any], place: int) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind != "message":
        raise CallFailed(
            400,
            f"an item of the type '{str(kind)[:40]}': only texts are looked at here.",
            code="content_not_inspected",
            param=f"input.{place}",
        )
    return {"role": item.get("role"), "content": item.get("content")}


def _format(given: Any) -> Any:
    """``text.format`` as ``response_format``."""
    if not isinstance(given, Mapping) or given.get("type") != "json_schema":
        return given
    schema = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


class Responses:
    """Writes one response.

    Args:
        asked: The call.
        undisclosed: An answer that a guard took back is complete.
    """

    def __init__(self, asked: Asked, *, undisclosed: bool) -> None:
        self.asked, self.undisclosed = asked, undisclosed
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._number, self._said = 0, ""
        self._finish: str | None = None

    def whole(self, replies: Sequence[Reply], usage: Usage) -> dict[str, Any]:
        """A response that is whole."""
        reply = replies[0]
        return self._response(self._status(reply.finish), reply.text, reply.finish, usage)

    def opening(self) -> bytes:
        """What comes before the first text."""
        started = {"response": self._response("in_progress")}
        item = {**self._item("", "in_progress"), "content": []}
        return b"".join(
            [
                self._event("response.created", started),
                self._event("response.in_progress", started),
                self._event("response.output_item.added", {"output_index": 0, "item": item}),
                self._event("response.content_part.added", {**self._place(), "part": _part("")}),
            ]
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        """A part of the text."""
        self._finish = piece.finish or self._finish
        if not piece.text:
            return b""
        self._said += piece.text
        delta = {**self._place(), "delta": piece.text, "logprobs": []}
        return self._event("response.output_text.delta", delta)

    def closing(self, usage: Usage) -> bytes:
        """What comes after the text."""
        said, finish = self._said, self._finish
        status = self._status(finish)
        whole = self._response(status, said, finish, usage)
        done = {"output_index": 0, "item": self._item(said, status)}
        text = {**self._place(), "text": said, "logprobs": []}
        return b"".join(
            [
                self._event("response.output_text.done", text),
                self._event("response.content_part.done", {**self._place(), "part": _part(said)}),
                self._event("response.output_item.done", done),
                self._event(f"response.{status}", {"response": whole}),
            ]
        )

    def failed(self, failed: CallFailed) -> bytes:
        """What comes instead of the rest."""
        about = failed.content()["error"]
        return self._event("error", {**about, "error": about})

    def _status(self, finish: str | None) -> str:
        hidden = finish == "content_filter" and self.undisclosed
        return "completed" if finish in ("stop", "tool_calls") or hidden else "incomplete"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def _item(self, text: str, status: str) -> dict[str, Any]:
        about = {"id": self.item, "type": "message", "role": "assistant", "status": status}
        return {**about, "content": [_part(text)]}

    def _response(
        self,
        status: str,
        text: str | None = None,
        finish: str | None = None,
        usage: Usage | None = None,
    ) -> dict[str, Any]:
        reason = {"length": "max_output_tokens"}.get(finish or "", "content_filter")
        told = None
        if usage is not None:
            told = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.asked.model.name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "output": [] if text is None else [self._item(text, status)],
            "parallel_tool_calls": False,
            "temperature": None,
            "top_p": None,
            "tool_choice": "none",
            "tools": [],
            "store": False,
            "usage": told,
        }

    def _event(self, kind: str, content: Mapping[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **content}
        if kind == "error":
            body["type"] = "error"
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + packed(body) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
