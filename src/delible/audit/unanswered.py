"""What a system could not be asked: said once, in one place, for the screen and the report."""

from __future__ import annotations

from collections.abc import Mapping

from delible.errors import RunError

#: Reasons that are listed, the commonest first.
LISTED = 3


def unanswered(title: str, asked: int, reasons: Mapping[str, int]) -> str | None:
    """How many questions have no answer, and why; None if all have one.

    Args:
        title: Who was asked, and how.
        asked: Different questions.
        reasons: Reason -> questions without an answer.
    """
    if not reasons:
        return None
    return f"{title}: {_counted(asked, reasons)}"


def check_answered(title: str, asked: int, reasons: Mapping[str, int]) -> None:
    """Stops an audit of a system that answered nothing.

    Raises:
        RunError: It did not answer a single question, so nothing can be said about it.
    """
    if asked and sum(reasons.values()) == asked:
        raise RunError(
            f"nothing was answered, so nothing can be audited. {_counted(asked, reasons)}",
            where=title,
            hint="If answers are cut off, allow longer ones: "
            "--metrics '{name: outcome, max_new_tokens: 1024}'."
            if any("cut off" in reason or "no text" in reason for reason in reasons)
            else None,
        )


def _counted(asked: int, reasons: Mapping[str, int]) -> str:
    common = sorted(reasons, key=lambda reason: (-reasons[reason], reason))
    listed = "; ".join(
        f"{reason} ({reasons[reason]:,})" if len(common) > 1 else reason
        for reason in common[:LISTED]
    )
    more = len(common) - LISTED
    others = f"; and {more} other reason{'s' if more > 1 else ''}" if more > 0 else ""
    questions = "question" if asked == 1 else "questions"
    return f"{sum(reasons.values()):,} of {asked:,} {questions} not answered: {listed}{others}."
