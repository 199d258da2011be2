"""What can be asked of a system, and what comes back. Hashable, so that equal asks are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from delible.records import Message


@dataclass(frozen=True)
class Prompt:
    """What a system sees before it answers.

    Attributes:
        messages: The conversation, usually one user turn.
        prefill: Start of the assistant's answer that the system must continue.
        text: Raw text to continue instead of a conversation (base models, passages).
    """

    messages: tuple[Message, ...] = ()
    prefill: str = ""
    text: str | None = None

    @classmethod
    def ask(cls, question: str, *, prefill: str = "", system: str | None = None) -> Prompt:
        """One user turn, after an optional system turn."""
        head = (Message(role="system", content=system),) if system else ()
        return cls((*head, Message(role="user", content=question)), prefill)


@dataclass(frozen=True)
class Score:
    """How likely is ``answer`` after ``prompt``, token by token?"""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Generate:
    """What does the system answer, greedily?"""

    prompt: Prompt
    max_new_tokens: int = 64


Request = Score | Generate


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced values at the answer's tokens (the end-of-turn token included).

    Attributes:
        logprobs: log p(token | prompt, earlier answer tokens), natural log, shape [answer].
        hits: Whether the token is the argmax, shape [answer].
        has_end: Whether the last token is the end-of-turn token.
    """

    logprobs: npt.NDArray[np.float32]
    hits: npt.NDArray[np.bool_]
    has_end: bool


Answer = TokenScores | str


@runtime_checkable
class System(Protocol):
    """Anything that answers: a model, a guarded model, a remote endpoint.

    Attributes:
        name: For people.
        capabilities: ``"generate"`` always; ``"score"``, ``"hidden"``, ``"weights"`` white-box.
        fingerprint: Changes whenever an answer could change (weights, template, guard);
            the key of the measurement cache. ``None`` means: never cache.
    """

    name: str
    capabilities: frozenset[str]

    @property
    def fingerprint(self) -> str | None: ...

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers, in the order of the prompts, without the prompt or prefill."""
        ...

    def score(self, requests: Sequence[Score]) -> list[TokenScores]:
        """Teacher-forced scores; only for systems with the capability ``"score"``."""
        ...
