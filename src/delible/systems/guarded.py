"""A guarded system. A guard stands before a system, sees the conversation, may answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from delible.component import build
from delible.context import Context
from delible.errors import RunError
from delible.method import ComponentMethod, Outcome
from delible.records import ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, System, identity_of


class GuardMind:
    """A guard at work: what it learned from the forget request, ready to judge."""

    def before(self, prompt: Prompt) -> str | None:
        """An answer to give instead of asking the system; ``None`` lets the prompt pass."""
        return None

    def after(self, prompt: Prompt, answer: str) -> str | None:
        """An answer to give instead of the system's; ``None`` lets it pass."""
        return None

    @property
    def fingerprint(self) -> str:
        """Changes whenever a judgement could change."""
        raise NotImplementedError


@dataclass(frozen=True)
class Guarding:
    """A guard and what it goes by: what is kept of it."""

    guard: Guard
    request: ForgetRequest


class Guard(ComponentMethod):
    """A guard's options; :meth:`prepare` makes it ready for a forget request."""

    gives_scores, needs_model = False, False

    def prepare(self, request: ForgetRequest) -> GuardMind:
        """Builds whatever the guard needs to judge (automata, indexes)."""
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        guarded = GuardedSystem(system, self.prepare(request), self.name)
        return Outcome(guarded, "guard", Guarding(self, request))


class GuardedSystem(BlackBox):
    """A system with a guard in front. It generates, and gives away nothing white-box."""

    def __init__(self, system: System, mind: GuardMind, guard: str) -> None:
        self.system, self.mind, self.guard = system, mind, guard
        self.name = f"{system.name} + {guard}"

    @property
    def fingerprint(self) -> str | None:
        inner = self.system.fingerprint
        return None if inner is None else f"{inner}+{self.mind.fingerprint}"

    @property
    def identity(self) -> str | None:
        """The same on every machine."""
        inner = identity_of(self.system)
        return None if inner is None else f"{inner}+{self.mind.fingerprint}"

    def taken_off(self) -> tuple[str, System]:
        """What is guarded."""
        return f"guard '{self.guard}'", self.system

    def merged(self) -> NoReturn:
        """A guard is not in weights.

        Raises:
            RunError: Always.
        """
        raise RunError(
            f"the guard '{self.guard}' is no part of the weights, and cannot be merged into them.",
            hint="Deploy it before the model (delible serve), or merge what it guards.",
        )

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers; a prompt that the guard answers never reaches the system.

        Neither does one with tools or pictures: the guard judges texts, and would not see them.
        """
        answers: list[str | NoAnswer | None] = [
            NoAnswer("the guard judges texts, not tools or pictures")
            if prompt.needs
            else self.mind.before(prompt)
            for prompt in prompts
        ]
        passed = [index for index, answer in enumerate(answers) if answer is None]
        replies = self.system.generate([prompts[index] for index in passed], decoding)
        for index, reply in zip(passed, replies, strict=True):
            # a failed call is no answer: there is nothing to judge
            judged = None if isinstance(reply, NoAnswer) else self.mind.after(prompts[index], reply)
            answers[index] = reply if judged is None else judged
        return ["" if answer is None else answer for answer in answers]


def guard(
    system: System, request: ForgetRequest, name: str = "target_detector", **options: Any
) -> GuardedSystem:
    """Puts a guard before a system.

    Args:
        system: What is guarded: a model, an endpoint, another guarded system.
        request: What must not come out.
        name: Name of the guard (``delible list guards``).
        **options: The guard's options (``delible show NAME``).

    Returns:
        A system that generates and gives no scores.

    Raises:
        RecipeError: An unknown guard or option.
        DataError: The request gives this guard nothing to go by.
    """
    mind = build("guard", {"name": name, **options}).prepare(request)
    return GuardedSystem(system, mind, name)
