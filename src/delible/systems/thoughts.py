"""Answers as they come: thoughts between ``<think>`` and ``</think>``, and unfinished texts."""

from __future__ import annotations

from collections.abc import Sequence

THINK, THOUGHT = "<think>", "</think>"
#: Why a thought without an answer is none.
CUT_THOUGHT = "it was cut off while it was thinking"


def is_cut_thought(text: str) -> bool:
    """Whether a text begins to think and never comes to an answer."""
    return text.lstrip().startswith(THINK) and THOUGHT not in text


def parted(text: str) -> tuple[str, str]:
    """Thoughts (with their marks, empty if there are none), and the answer after them."""
    thoughts, mark, answer = text.rpartition(THOUGHT)
    return thoughts + mark, answer


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that stays as it is whatever follows.

    White space at both ends, the beginning of a stop text, and a character whose bytes are not
    all there wait for what follows.
    """
    text = text.lstrip()
    held = max(
        (
            size
            for one in stop
            for size in range(1, len(one))
            if text.endswith(one[:size])
        ),
        default=0,
    )  # fmt: skip
    return text[: len(text) - held].rstrip("\ufffd").rstrip()
