"""What guards that consult have in common: what they show, and what their judgements cost.

What a user or a model wrote is shown between marks that are made from it, so that nothing in it
can end it: a text that held its own mark would have another one.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from delible import prompts as prompt_files
from delible.system.asks import Prompt
from delible.system.questions import LETTERS
from delible.systems.judged_text import texts_of
from delible.systems.judging import Consult

_BLANK = re.compile(r"\{(\w+)\}")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*\S", re.MULTILINE)


def filled(file: str, **values: object) -> str:
    """A prompt file with ``{name}`` replaced; what is put in is not looked at again.

    Other braces stay, for prompts show JSON.
    """
    text = "\n".join(
        line for line in prompt_files.read_text(file).split("\n") if not line.startswith("#")
    )
    known = {name: str(value) for name, value in values.items()}
    return _BLANK.sub(lambda found: known.get(found[1], found[0]), text).strip()


def fenced(text: str, tag: str) -> str:
    """A text between marks that it cannot hold."""
    mark = f"{tag}-{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    return f"<{mark}>\n{text}\n</{mark}>"


def conversation(prompt: Prompt) -> str:
    """All that a guard is shown of a prompt, as one text."""
    return "\n\n".join(text for text in texts_of(prompt) if text.strip())


def last_asked(prompt: Prompt) -> str:
    """The last turn, or the raw text."""
    return prompt.messages[-1].text if prompt.messages else prompt.text or ""


def rephrased(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another last turn, or another raw text."""
    if not prompt.messages:
        return replace(prompt, text=text)
    return replace(prompt, messages=(*prompt.messages[:-1], prompt.messages[-1].with_text(text)))


# ---- multiple choice


def letters_in(text: str) -> str:
    """The letters of the options that a question offers, from A on; empty if fewer than two.

    An option is a line that starts with a letter and ``.``, ``)`` or ``:``.
    """
    wanted = 0
    for found in _OPTION.finditer(text):
        if found[1] == LETTERS[wanted % len(LETTERS)]:
            wanted += 1
    return LETTERS[:wanted] if wanted > 1 else ""


def is_letter(answer: str, letters: str) -> bool:
    """Whether an answer is one of these letters and nothing else."""
    found = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    return found is not None and found[1].upper() in letters


def random_letter(letters: str, prompt: Prompt, seed: int) -> str:
    """One of them, uniformly; which one depends on the seed and the prompt alone."""
    key = hashlib.sha256(repr(prompt).encode("utf-8", "backslashreplace")).hexdigest()
    return Random(f"{seed}/letter/{key}").choice(letters)


# ---- costs


class Costs:
    """What judgements cost and came to, counted as they go. Safe to be used by many at once.

    Attributes:
        told: The counts so far, as plain data: ``prompts``, ``calls`` and ``tokens`` by part, and
            ``outcomes`` by word. Tokens are those that were asked for, not what came back.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self.told: dict[str, Any] = {
            "prompts": 0,
            "calls": dict.fromkeys(parts, 0),
            "tokens": dict.fromkeys(parts, 0),
            "outcomes": {},
        }

    def prompt(self) -> None:
        """Another prompt came in."""
        with self._lock:
            self.told["prompts"] += 1

    def outcome(self, word: str) -> None:
        """What became of something."""
        with self._lock:
            self.told["outcomes"][word] = self.told["outcomes"].get(word, 0) + 1

    def asks(self, part: str, consult: Consult) -> Generator[Consult, Any, Any]:
        """Consults, and counts it; what comes back is handed on.

        Raises:
            Unanswered: As where a :class:`Consult` is yielded.
        """
        with self._lock:
            self.told["calls"][part] += 1
            self.told["tokens"][part] += consult.decoding.max_new_tokens
        return (yield consult)


def per_prompt(told: Mapping[str, Any]) -> dict[str, float]:
    """Calls of each part per prompt, of :attr:`Costs.told`; 0 before the first prompt."""
    prompts = max(1, int(told["prompts"]))
    return {part: calls / prompts for part, calls in told["calls"].items()}


__all__ = [
    "Costs",
    "conversation",
    "fenced",
    "filled",
    "is_letter",
    "last_asked",
    "letters_in",
    "per_prompt",
    "random_letter",
    "rephrased",
]
