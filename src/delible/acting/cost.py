"""What calls cost, in tokens: prices change, so only tokens are kept.

cost        = input * price_in + output * price_out
break-even  = cost of demonstrations / (teacher's cost - method's cost, per episode)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, System


@dataclass(frozen=True)
class Usage:
    """Tokens of some calls.

    Attributes:
        input_tokens: Of all prompts.
        repeated_tokens: Of them, those of a prompt that was the one before it, too; drawing
            several answers at once, or a cache, does not pay for them again.
    """

    calls: int = 0
    input_tokens: int = 0
    repeated_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.repeated_tokens + other.repeated_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __sub__(self, other: Usage) -> Usage:
        return self + Usage(-other.calls, -other.input_tokens, -other.repeated_tokens,
                            -other.output_tokens)  # fmt: skip

    def cost(self, price_in: float, price_out: float, *, repeats_paid: bool = False) -> float:
        """In the unit of the prices, which are per token.

        Args:
            repeats_paid: Whether a prompt that is asked again is paid again.
        """
        asked = self.input_tokens - (0 if repeats_paid else self.repeated_tokens)
        return asked * price_in + self.output_tokens * price_out


class Metered(BlackBox):
    """A system whose calls are counted.

    Args:
        count: Tokens of a text; the default counts words and signs, which is not what is billed.
    """

    def __init__(self, system: System, count: Callable[[str], int] | None = None) -> None:
        self.system, self.count = system, count or words_and_signs
        self.name, self.usage = system.name, Usage()
        self._before: Prompt | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.system.fingerprint

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        answers = list(self.system.generate(prompts, decoding))
        for prompt, answer in zip(prompts, answers, strict=True):
            texts = [*(one.text for one in prompt.messages), prompt.text or "", prompt.prefill]
            asked = sum(map(self.count, texts))
            again = asked if prompt == self._before else 0
            self.usage += Usage(1, asked, again, self.count(str(answer)))
            self._before = prompt
        return answers


def words_and_signs(text: str) -> int:
    """How many words and signs a text has."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def break_even(demonstrations: float, teacher: float, method: float) -> float:
    """Episodes after which a method has paid for its demonstrations; inf if it is not cheaper.

    Args:
        demonstrations: What they cost once.
        teacher: Cost of an episode by the teacher alone.
        method: Cost of an episode by the method.
    """
    return demonstrations / (teacher - method) if method < teacher else math.inf


__all__ = ["Metered", "Usage", "break_even", "words_and_signs"]
