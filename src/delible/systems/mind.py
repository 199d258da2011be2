"""A guard at work: what judges, whatever it goes by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from delible import prompts as prompt_files
from delible.system.asks import Prompt
from delible.system.base import System
from delible.systems.judging import Judged, Reading, Reads, Refuse, Scanner, settle_all


class GuardMind:
    """A guard at work: what it learned from the forget request, ready to judge.

    A judgement is a decision, or a generator that yields :class:`Consult` and returns one.

    Attributes:
        reads: How much of an answer it must see before some of it may go out: ``"words"`` holds
            back what its :meth:`scanners` say, ``"sentences"`` judges sentence by sentence,
            ``"whole"`` lets nothing out before the end.
        threaded: Judging takes long enough that other requests should go on meanwhile.
        sees_pictures: It judges pictures too; otherwise no conversation with one is answered.
        refusals: What is said instead of an answer; none: the built-in hundred.
        consulted: Systems that it asks, in a fixed order; its judgements depend on them.
        notes: What it has to say about itself (thresholds, measured rates), as plain data.
    """

    reads: Reads = "whole"
    threaded: bool = True
    sees_pictures: bool = False
    refusals: tuple[str, ...] = ()
    consulted: Sequence[System] = ()
    notes: Mapping[str, Any] = {}

    def before(self, prompt: Prompt) -> Judged:
        """What becomes of a conversation; ``None`` lets it pass as it is."""
        return None

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        """What becomes of an answer: ``None``, :class:`Refuse` or :class:`Say`.

        Args:
            prompt: What it answers, as it came in.
            answer: All of it, or (for ``"sentences"``) up to the end of a sentence; calls of tools
                follow the text.
            since: How much of it was judged before.
        """
        if self.reads != "words":
            return None
        course = settle_all([partial(Reading(self, prompt).read, answer, ended=True)])[0]
        if course.failure is not None:
            raise course.failure
        return course.decision

    def scanners(self) -> Sequence[Scanner]:
        """What finds words that must not go out; for ``reads = "words"``."""
        return ()

    def refuse(self, prompt: Prompt) -> Refuse:
        """A refusal; which one depends on the prompt alone."""
        said = self.refusals or prompt_files.read_lines("refusals.txt")
        key = hashlib.sha256(repr(prompt).encode("utf-8", "backslashreplace")).digest()
        return Refuse(said[int.from_bytes(key[:8], "big") % len(said)])

    @property
    def fingerprint(self) -> str:
        """Changes whenever a judgement could change."""
        raise NotImplementedError


__all__ = ["GuardMind"]
