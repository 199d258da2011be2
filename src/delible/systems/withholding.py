"""What is said in place of an answer, and by whom it was withheld."""

from __future__ import annotations

from delible.system.replies import Piece, Reply, Usage
from delible.systems.judging import Refuse, Say

#: Between what was sent of an answer and the refusal that ends it.
BREAK = "\n\n"


def reply_of(decision: Refuse | Say, guard: str) -> Reply:
    """A decision as a whole answer.

    Args:
        decision: What a guard says instead of the system.
        guard: Its name.
    """
    if isinstance(decision, Say):
        return Reply(decision.text)
    failed = decision.failed
    return Reply(decision.text, "content_filter", withheld_by=guard, guard_failed=failed)


def last_piece(
    decision: Refuse | Say,
    guard: str,
    *,
    usage: Usage | None = None,
    passed: str = "",
    after: bool = False,
) -> Piece:
    """A decision as the end of a stream.

    Args:
        decision: What a guard says instead of the rest.
        guard: Its name.
        usage: Of what was asked so far.
        passed: What of the answer may still go out before it.
        after: Whether some of the answer was sent before.
    """
    reply = reply_of(decision, guard)
    return Piece(
        f"{passed}{BREAK}{reply.text}" if after or passed else reply.text,
        reply.finish,
        usage or Usage(),
        withheld_by=reply.withheld_by,
        guard_failed=reply.guard_failed,
    )


__all__ = ["BREAK", "last_piece", "reply_of"]
