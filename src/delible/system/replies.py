"""What comes back from a system that serves: a reply, or its pieces as they are spoken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delible.errors import DelibleError
from delible.messages import ToolCall

#: Why an answer ended: by itself (or before a stop text), at its length, to call tools, or taken
#: back by a guard.
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

#: Why there is no answer where a server's own filter left nothing of it.
WITHHELD = "the server's filter withheld the answer"


class Unanswered(DelibleError):  # noqa: N818 (nobody did anything wrong)
    """A system could not answer: too long a prompt, values that are no numbers, a failed call.

    Args:
        problem: Why.
        status: What a server says of it, as an HTTP status: 400 if another question would be
            answered, 429 if another time; None: nothing is known.
        wait_seconds: After which it may be tried again.
    """

    def __init__(
        self, problem: str, *, status: int | None = None, wait_seconds: float = 0.0
    ) -> None:
        super().__init__(problem)
        self.status, self.wait_seconds = status, wait_seconds


@dataclass(frozen=True)
class Usage:
    """Tokens that went in and came out; 0 where a system does not tell."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was generated: its text, and its natural log-probability (at most 0)."""

    token: str
    logprob: float


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        tool_calls: What it calls; the text is then often empty.
        logprobs: Of all tokens that were generated, those of thoughts and of what a stop text
            cut off included; None where the system was not asked or does not tell.
        withheld_by: The guard that took the answer back, if one did; empty where the server
            behind says so of itself.
        guard_failed: It did so because its judgement came to nothing.
    """

    text: str
    finish: FinishReason = "stop"
    usage: Usage = Usage()
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    withheld_by: str = ""
    guard_failed: bool = False


@dataclass(frozen=True)
class ToolCallPiece:
    """A part of a call: ``id`` and ``name`` come once, arguments are joined.

    Attributes:
        index: Which of the answer's calls it belongs to, from 0.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has the reason of the end and the usage.

    Attributes:
        withheld_by: Of the last one: as in :class:`Reply`; so is ``guard_failed``.
    """

    text: str
    finish: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: tuple[ToolCallPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    withheld_by: str = ""
    guard_failed: bool = False
