"""Roles: who judges, writes, attacks … by talking, and how such a part is asked.

Any system can play a role. A :class:`Role` is that system with what talking parts need: failed
calls are tried again, what may be spent has a limit, and a reply can be asked for in a form
(:meth:`Role.ask`) that is checked before anybody uses it. What could not be answered, or stays
unreadable, is a :class:`NoAnswer` with a reason; it never counts as an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

from pydantic import BaseModel, Field

from delible.component import Config
from delible.errors import RunError
from delible.records import Message
from delible.system.asks import (
    Answer,
    Array,
    Decoding,
    Generate,
    Inspection,
    NoAnswer,
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.system.base import System
from delible.system.forms import read_form

RoleName = Literal[
    "judge", "writer", "attacker", "guard", "critic", "planner", "translator", "captioner"
]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
#: How a reply in a form is drawn.
READABLE = Decoding(max_new_tokens=1024)
#: Characters of an unreadable reply that its sender is shown again.
SHOWN_AGAIN = 4000

Form = TypeVar("Form", bound=BaseModel)


class Answers(Protocol):
    """Where replies are kept, by the system's fingerprint."""

    def read(self, fingerprint: str, requests: list[Request]) -> dict[Request, Answer]: ...

    def write(self, fingerprint: str, answers: Mapping[Request, Answer]) -> None: ...


class RoleOptions(Config):
    """How a role is played."""

    system: str = Field(
        "", description="Who plays it: a model's name or folder, or a server's address with #MODEL."
    )
    calls: int | None = Field(None, ge=1, description="Questions that it may be asked in all.")
    tokens: int | None = Field(None, ge=1, description="Tokens that it may be asked for in all.")
    retries: int = Field(
        0,
        ge=0,
        le=10,
        description="How often a failed call is made again (a server was tried again before that).",
    )
    attempts: int = Field(3, ge=1, le=10, description="Times it is asked for a readable reply.")


@dataclass
class Spent:
    """What a role has cost so far.

    Attributes:
        calls: Questions that were asked.
        tokens: Tokens that were asked for: the sum of the limits, not what came back.
    """

    calls: int = 0
    tokens: int = 0


class Role:
    """A system that plays a part. Asked like any system, or for a reply in a form.

    Args:
        part: Which part.
        system: Who plays it.
        options: Its budget, and how often it is tried.
        answers: Replies from before, for :meth:`ask`; None keeps none.
    """

    def __init__(
        self,
        part: RoleName,
        system: System,
        options: RoleOptions | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.part, self.system, self.answers = part, system, answers
        self.options = options or RoleOptions()
        self.spent = Spent()
        self.name, self.capabilities = system.name, system.capabilities

    def __repr__(self) -> str:
        return f"Role({self.part!r}, {self.name!r})"

    @property
    def fingerprint(self) -> str | None:
        return self.system.fingerprint

    @property
    def on_answers(self) -> Callable[[int], None] | None:
        """That of the system; see :class:`System`.

        Raises:
            AttributeError: The system has none.
        """
        return self.system.on_answers  # type: ignore[attr-defined]

    @on_answers.setter
    def on_answers(self, heard: Callable[[int], None] | None) -> None:
        self.system.on_answers = heard  # type: ignore[attr-defined]

    # ---- as a system

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers, in the order of the prompts; failed calls are made again.

        Raises:
            RunError: The budget is spent; nothing of this was asked.
        """
        answers = self._called(prompts, decoding)
        for _ in range(self.options.retries):
            failed = [place for place, one in enumerate(answers) if isinstance(one, NoAnswer)]
            if not failed:
                break
            again = self._called([prompts[place] for place in failed], decoding)
            for place, answer in zip(failed, again, strict=True):
                answers[place] = answer
        return answers

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        self._pay(len(requests), 0)
        return self.system.score(requests)

    def inspect(self, requests: Sequence[Inspection]) -> list[Array | NoAnswer]:
        self._pay(len(requests), 0)
        return self.system.inspect(requests)

    def _called(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self._pay(len(prompts), len(prompts) * decoding.max_new_tokens)
        try:
            return list(self.system.generate(prompts, decoding))
        except OSError as error:  # a connection, a time limit: the next try may succeed
            reason = f"the {self.part} could not be asked ({type(error).__name__}: {error})"
            return [NoAnswer(reason)] * len(prompts)

    def _pay(self, calls: int, tokens: int) -> None:
        for what, spent, more, limit in (
            ("calls", self.spent.calls, calls, self.options.calls),
            ("tokens", self.spent.tokens, tokens, self.options.tokens),
        ):
            if limit is not None and spent + more > limit:
                raise RunError(
                    f"the budget of {limit:,} {what} is spent ({spent:,} so far, {more:,} more "
                    "are wanted).",
                    where=f"role '{self.part}' ({self.name})",
                    hint=f"Raise '{what}' of the role; what was answered is kept.",
                )
        self.spent.calls += calls
        self.spent.tokens += tokens

    # ---- in a form

    def ask(
        self, prompt: Prompt | str, form: type[Form], decoding: Decoding = READABLE
    ) -> Form | NoAnswer:
        """A reply that fits a form; see :meth:`ask_all`."""
        return self.ask_all([prompt], form, decoding)[0]

    def ask_all(
        self, prompts: Sequence[Prompt | str], form: type[Form], decoding: Decoding = READABLE
    ) -> list[Form | NoAnswer]:
        """Replies that fit a form, in the order of the prompts.

        A reply that does not is shown to its sender with what is wrong, at most
        ``options.attempts`` times in all. Replies are kept by system, question and decoding.

        Args:
            form: What the reply's JSON must fit.

        Returns:
            The form, filled; or why there is none: the call failed, or no reply could be read.

        Raises:
            RunError: The budget is spent.
        """
        asked = [Prompt.ask(one) if isinstance(one, str) else one for one in prompts]
        found: dict[int, Form | NoAnswer] = {}
        waiting = dict(enumerate(asked))
        for attempt in range(self.options.attempts):
            replies = self._replies(list(waiting.values()), decoding)
            unread: dict[int, Prompt] = {}
            for place, prompt in waiting.items():
                reply = replies[prompt]
                if isinstance(reply, NoAnswer):
                    found[place] = reply
                    continue
                read = read_form(reply, form)
                if not isinstance(read, str):
                    found[place] = read
                    continue
                unread[place] = _asked_again(prompt, reply, read)
                times = f"{attempt + 1} attempt{'s' if attempt else ''}"
                found[place] = NoAnswer(
                    f"the {self.part}'s reply cannot be used after {times}: {read}"
                )
            waiting = unread
            if not waiting:
                break
        return [found[place] for place in range(len(asked))]

    def _replies(
        self, prompts: Sequence[Prompt], decoding: Decoding
    ) -> dict[Prompt, str | NoAnswer]:
        """Replies to different prompts, those from before first."""
        requests: dict[Prompt, Request] = {one: Generate(one, decoding) for one in prompts}
        found: dict[Prompt, str | NoAnswer] = {}
        kept = self.fingerprint if self.answers is not None else None
        if self.answers is not None and kept is not None:
            before = self.answers.read(kept, list(requests.values()))
            found = {
                prompt: before[request]  # type: ignore[misc]
                for prompt, request in requests.items()
                if isinstance(before.get(request), str)
            }
        missing = [prompt for prompt in requests if prompt not in found]
        if missing:
            new = dict(zip(missing, self.generate(missing, decoding), strict=True))
            if self.answers is not None and kept is not None:
                answered = {requests[one]: reply for one, reply in new.items()}
                self.answers.write(
                    kept,
                    {one: reply for one, reply in answered.items() if isinstance(reply, str)},
                )
            found |= new
        return found


def _asked_again(prompt: Prompt, reply: str, problem: str) -> Prompt:
    """The question, the reply, and what is wrong with it."""
    correction = (
        f"Your reply cannot be used: {problem}. Reply to the same question again, with nothing but "
        "JSON in the form that was asked for."
    )
    before = prompt.messages or (Message(role="user", content=prompt.text or ""),)
    return Prompt(
        (
            *before,
            Message(
                role="assistant", content=(prompt.prefill + reply)[:SHOWN_AGAIN] or "(nothing)"
            ),
            Message(role="user", content=correction),
        )
    )


__all__ = ["ROLES", "Answers", "Role", "RoleName", "RoleOptions", "Spent"]
