"""A teacher who knows a town, and a student who knows what it is shown and slips now and then.

Both follow :class:`delible.acting.town_policy.Walker` on what they know, so a demonstration is a
shortest way, and what a student gets wrong is what it was not shown, or a slip. A student's samples
differ by their seeds alone: the same prompt gives the same samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from delible.acting.town import MOVES, SIGHT, Town, known
from delible.acting.town_policy import DONE, Walker
from delible.messages import Message
from delible.prompts import read_text
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox


def planned(prompt: Prompt, told: str) -> str | None:
    """A plan: where the places of a task are, as far as it is told; None: no plan is asked for.

    Args:
        told: What the planner knows.
    """
    if prompt.messages[0].text != read_text("agent_icd_plan.txt"):
        return None
    task = prompt.messages[-1].text.rpartition("Task: ")[2]
    spots = dict.fromkeys(one.group(0) for one in SIGHT.finditer(told)
                          if one.group(3) in task or one.group(5) in task)  # fmt: skip
    return json.dumps({"plan": [f"{one}." for one in spots] or ["Look for it."]})


class Teacher(BlackBox):
    """Knows every place of a town.

    Attributes:
        prompts: Everything that it was asked, in order.
    """

    name, fingerprint = "teacher", None

    def __init__(self, town: Town) -> None:
        self.told = "\n".join(one.text for one in known(town.places, town.name))
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.prompts += prompts
        return [planned(one, self.told) or self._acted(one) for one in prompts]

    def _acted(self, prompt: Prompt) -> str:
        system, first, *rest = prompt.messages
        knowing = Message(role="user", content=f"{self.told}\n{first.text}")
        return Walker()(Prompt((system, knowing, *rest)))


class Student(BlackBox):
    """Knows what it is shown.

    Args:
        slips: Share of actions that are another one: half of them a step anywhere, half of them
            the end.

    Attributes:
        prompts: Everything that it was asked, in order.
    """

    name, fingerprint = "student", None

    def __init__(self, slips: float) -> None:
        self.slips = slips
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.prompts += prompts
        return [
            planned(one, one.messages[-1].text) or self._acted(one, decoding) for one in prompts
        ]

    def _acted(self, prompt: Prompt, decoding: Decoding) -> str:
        text = f"{decoding.seed}" + "\n".join(one.text for one in prompt.messages)
        draw = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
        if draw.random() < self.slips:
            way = tuple(MOVES)[int(draw.integers(4))]
            slip = {"tool": "walk", "arguments": {"direction": way}}
            return json.dumps(slip if draw.random() < 0.5 else {"answer": DONE})
        return Walker()(prompt)


__all__ = ["Student", "Teacher", "planned"]
