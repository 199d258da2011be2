"""What an OpenAI-compatible server's reply says: an answer, a failure, or that to wait.

Servers report failures in several ways: a status, an ``error`` in a reply with status 200, a
broken body. And reasoning models answer in several ways: the thoughts stand in the text between
``<think>`` and ``</think>``, or in a field of their own. Both become one form here: the text as
the model wrote it, thoughts first. A thought that was cut off is no answer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from delible.systems.thoughts import (
    CUT_THOUGHT,
    THINK,
    THOUGHT,
    is_cut_thought,
)

#: Failures that may pass: timeouts, conflicts, rate limits; and every server error.
PASSING = (408, 409, 425, 429)
#: What a rate limit is called that no waiting lifts.
SPENT = "insufficient_quota"
#: Fields in which servers put thoughts.
REASONING = ("reasoning_content", "reasoning", "thinking")


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


def said(content: Any) -> str:
    """The text of a completion of either kind, thoughts first.

    Raises:
        CallError: There is none. An empty text is one, unless something withheld it or it was cut
            off before it began.
    """
    try:
        choice = content["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        refusal = None if message is None else message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallError("the reply is not a completion") from None
    if choice.get("error"):
        raise _told(choice["error"])
    if isinstance(text, list):  # parts, as some servers send them
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    text = text if isinstance(text, str) and text else refusal or text
    thoughts = _thoughts(message)
    ended = choice.get("finish_reason")
    answered = isinstance(text, str) and bool(text.strip())
    if (thoughts and not answered) or (isinstance(text, str) and is_cut_thought(text)):
        raise CallError(CUT_THOUGHT, thinking=True)
    if not answered and ended == "content_filter":
        raise CallError("the server's filter withheld the answer")
    if not isinstance(text, str) or (not text and ended == "length"):
        # models that think in secret use up the limit and show nothing
        reason = f"the reply has no text (finish reason '{ended}')"
        raise CallError(reason, thinking=ended == "length")
    return f"{THINK}\n{thoughts}\n{THOUGHT}\n\n{text}" if thoughts else text


def _thoughts(message: Any) -> str:
    found = (message.get(name) for name in REASONING) if isinstance(message, dict) else ()
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")


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
