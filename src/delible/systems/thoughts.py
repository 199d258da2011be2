"""Thoughts that a model writes before its answer, between ``<think>`` and ``</think>``."""

from __future__ import annotations

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
