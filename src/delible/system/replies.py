"""What comes back from a system that serves: a reply, or its pieces as they are spoken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delible.errors import DelibleError

#: Why an answer ended: by itself (or before a stop text), at its length, or taken back by a guard.
FinishReason = Literal["stop", "length", "content_filter"]


class Unanswered(DelibleError):  # noqa: N818 (nobody did anything wrong)
    """A system could not answer: too long a prompt, values that are no numbers, a failed call."""


@dataclass(frozen=True)
class Usage:
    """Tokens that went in and came out; 0 where a system does not tell."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    finish: FinishReason = "stop"
    usage: Usage = Usage()


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has the reason of the end and the usage."""

    text: str
    finish: FinishReason | None = None
    usage: Usage | None = None
