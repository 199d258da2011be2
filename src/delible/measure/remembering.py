"""A system whose answers are kept: what was asked before is not asked again."""

from __future__ import annotations

from collections.abc import Sequence

from delible.measure.cache import Cache
from delible.measure.engine import Progress, measure
from delible.system.asks import Decoding, Generate, NoAnswer, Prompt
from delible.system.base import BlackBox, System


class Remembering(BlackBox):
    """Answers as the system does. For those who talk with it themselves.

    Args:
        system: Who is asked.
        cache: Of answers; None: everything is asked.
        progress: Called with (answers there are, answers there will be).

    Attributes:
        asked: Questions so far.
    """

    def __init__(self, system: System, cache: Cache | None, progress: Progress | None) -> None:
        self.system, self.cache, self.progress = system, cache, progress
        self.name, self.capabilities = system.name, system.capabilities
        self.asked = 0

    @property
    def fingerprint(self) -> str | None:
        return self.system.fingerprint

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers, in the order of the prompts."""
        requests = [Generate(prompt, decoding) for prompt in prompts]
        self.asked += len(requests)
        answers = measure(self.system, requests, cache=self.cache, progress=self.progress)
        found = [answers[request] for request in requests]
        return [one if isinstance(one, str | NoAnswer) else NoAnswer("no text") for one in found]


__all__ = ["Remembering"]
