"""Failures of a call, as clients of OpenAI's API read them."""

from __future__ import annotations

import math
from typing import Any

from delible.system.replies import Unanswered

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class CallFailed(Exception):  # noqa: N818 (most are the client's mistakes)
    """A call without an answer.

    Args:
        status: HTTP status.
        message: What is wrong, for the client.
        code: For programs.
        param: The field that it concerns.
        wait_seconds: After which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        wait_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.wait_seconds = wait_seconds

    def content(self) -> dict[str, Any]:
        """The body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        about = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": about}

    def headers(self) -> dict[str, str]:
        """What the head of the reply says."""
        wait = self.wait_seconds
        return {} if not wait else {"retry-after": str(math.ceil(wait))}


def of_system(failed: Unanswered) -> CallFailed:
    """What a client is told of a system that gave no answer.

    A mistake in the question is the client's (400), a limit is passed on with its wait (429);
    everything else, a refused key of ours included, is a failure of what stands behind (502).
    """
    status = failed.status
    if status in (400, 404, 413, 422):
        longest = "longer than" in failed.problem or "context" in failed.problem
        code = "context_length_exceeded" if longest else "not_answerable"
        return CallFailed(400, failed.problem, code=code)
    if status == 429:
        wait = failed.wait_seconds or 1.0
        return CallFailed(429, failed.problem, code="rate_limit_exceeded", wait_seconds=wait)
    if status in (408, 504):
        return CallFailed(504, failed.problem, code="timeout")
    if status == 503:
        return CallFailed(503, failed.problem, code="unavailable", wait_seconds=failed.wait_seconds)
    return CallFailed(502, f"There is no answer: {failed.problem}", code="no_answer")
