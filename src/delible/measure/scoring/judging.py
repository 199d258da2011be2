"""Answers that another system grades, criterion by criterion. No metric lives here.

    value = mean over the criteria of the judge's grade, 0 to 10

The judge sees what was asked and the whole reply, the reasoning trace included, and answers in
JSON. It is asked greedily; a reply that cannot be read is drawn again, with other seeds, a counted
number of times. What stays unreadable, or was not answered, is no value, never 0.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, PrivateAttr, field_validator

from delible.errors import RecipeError
from delible.kept import cache_folder
from delible.measure.cache import Cache
from delible.measure.engine import Progress, measure
from delible.measure.metric import Answers, Item, ItemMetric
from delible.measure.scoring.text import continuing, generated
from delible.measure.starting import roles_of
from delible.prompts import read_text
from delible.records import QA, Dialogue, RecordBase
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Request,
)
from delible.system.base import System
from delible.system.questions import ask
from delible.system.role import Role
from delible.system.roles import Roles

HIGHEST = 10
#: Of the draws after the first, greedy reply could not be read.
RETRY_TEMPERATURE = 0.7
#: Stands in a prompt file for what was asked and replied.
EXCHANGE = "{exchange}"


@dataclass(frozen=True)
class Grade:
    """One criterion's grade, in [0, 10], and the judge's reason (may be empty)."""

    score: float
    reason: str


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text, nested ones after those around them."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        with contextlib.suppress(ValueError, RecursionError):  # no JSON after all
            yield decoder.raw_decode(text, start)[0]
        start = text.find("{", start + 1)


def _grade(given: Any) -> Grade | None:
    """A grade written as ``{"score": 7, "reason": "…"}``, ``7`` or ``"7"``."""
    score, reason = (
        (given.get("score"), given.get("reason")) if isinstance(given, dict) else (given, None)
    )
    if isinstance(score, bool) or not isinstance(score, int | float | str):
        return None
    try:
        number = float(score)
    except (ValueError, OverflowError):
        return None
    if not 0 <= number <= HIGHEST:  # nor is NaN
        return None
    # "|" parts the details of a record's prompt variants
    words = reason.replace("|", "/").split() if isinstance(reason, str) else []
    return Grade(number, " ".join(words))


def read_grades(text: str, criteria: Sequence[str]) -> dict[str, Grade] | str:
    """The grades in a judge's reply, or what is wrong with it.

    The last JSON object that names every criterion counts: prose, a code fence or drafts may
    stand before it.

    Args:
        text: The reply.
        criteria: In lower case.
    """
    found = [
        {str(key).strip().lower(): value for key, value in one.items()} for one in _objects(text)
    ]
    named = [one for one in found if any(name in one for name in criteria)]
    if not named:
        return "no JSON object with grades"
    whole = [one for one in named if all(name in one for name in criteria)]
    last = (whole or named)[-1]
    grades = {name: _grade(last.get(name)) for name in criteria}
    wrong = [name for name, grade in grades.items() if grade is None]
    if wrong:
        return f"no grade from 0 to {HIGHEST} for {', '.join(wrong)}"
    return {name: grade for name, grade in grades.items() if grade is not None}


def exchange(prompt: Prompt, text: str) -> str:
    """What was asked and the whole reply, as a judge reads it.

    A reply that was begun for the system (``prefill``) is shown with its beginning.
    """
    turns = prompt.messages
    if prompt.text is not None:
        asked = prompt.text
    elif len(turns) == 1:
        asked = turns[0].text
    else:
        asked = "\n".join(f"({turn.role}) {turn.text}" for turn in turns)
    reply = (prompt.prefill + continuing(prompt, text)) if prompt.prefill else text
    return f"[Question]\n{asked}\n\n[Reply]\n{reply.strip() or '(nothing)'}\n\n[End of the reply]"


class Judge:
    """A system that grades, asked about many replies at once.

    What will have to be graded is noted first; then all of it is asked at once.

    Args:
        system: The judge.
        criteria: What it grades.
        max_new_tokens: Of its reply.
        attempts: How often it is asked about one reply at most.
        cache: Its answers from earlier measurements.
    """

    def __init__(
        self,
        system: System,
        criteria: Sequence[str],
        max_new_tokens: int,
        attempts: int,
        cache: Cache | None = None,
    ) -> None:
        self.system, self.criteria, self.cache = system, criteria, cache
        self.max_new_tokens, self.attempts = max_new_tokens, attempts
        self._noted: dict[Prompt, None] = {}
        self._graded: dict[Prompt, dict[str, Grade] | str] = {}

    def note(self, prompt: Prompt) -> None:
        """This will have to be graded."""
        if prompt not in self._graded:
            self._noted[prompt] = None

    def grades(self, prompt: Prompt) -> dict[str, Grade] | str:
        """The grades by criterion, or why there are none."""
        self.note(prompt)
        self.ask_noted()
        return self._graded[prompt]

    def ask_noted(self, progress: Progress | None = None) -> None:
        """Asks about everything noted; ``progress`` as in :func:`measure`, attempt by attempt."""
        if self._noted:
            self._ask(list(self._noted), progress)
            self._noted.clear()

    def _decoding(self, attempt: int) -> Decoding:
        if attempt == 0:
            return Decoding(self.max_new_tokens)
        return Decoding(self.max_new_tokens, temperature=RETRY_TEMPERATURE, seed=attempt)

    def _ask(self, prompts: Sequence[Prompt], progress: Progress | None) -> None:
        unread = list(prompts)
        for attempt in range(self.attempts):
            requests = {prompt: Generate(prompt, self._decoding(attempt)) for prompt in unread}
            replies = measure(self.system, requests.values(), cache=self.cache, progress=progress)
            unread = []
            for prompt, request in requests.items():
                reply = replies[request]
                if isinstance(reply, NoAnswer):  # an endpoint has tried again by itself
                    self._graded[prompt] = f"the judge did not answer: {reply.reason}"
                    continue
                grades = read_grades(generated(reply), self.criteria)
                if isinstance(grades, str):
                    unread.append(prompt)
                    times = f"{attempt + 1} attempt{'s' if attempt else ''}"
                    grades = f"the judge's reply cannot be used after {times}: {grades}"
                self._graded[prompt] = grades
            if not unread:
                break


def graded_item(grades: Mapping[str, Grade] | str) -> Item:
    """Mean of the grades, with the reasons as detail; no value where there are no grades."""
    if isinstance(grades, str):
        return Item(None, grades)
    told = [
        f"{name} {grade.score:g}: {grade.reason or 'no reason given'}"
        for name, grade in grades.items()
    ]
    return Item(float(np.mean([grade.score for grade in grades.values()])), None, "; ".join(told))


#: What to do where nobody judges.
_NAME_IT = (
    "name the system that judges, as in "
    '{"name": "METRIC", "judge": "https://host/v1#MODEL"}, or --role judge=MODEL; a model\'s '
    "name or folder will do as well"
)


class JudgedMetric(ItemMetric):
    """Base of the metrics whose value another system gives."""

    judge: str | None = Field(
        None,
        description="The system that grades: a model's name or folder, or the address of an "
        "OpenAI-compatible server with #MODEL at its end. Default: who plays the role 'judge' "
        "(--role judge=MODEL); one of both must be given.",
    )
    max_new_tokens: int = Field(
        512, ge=1, le=8192, description="Tokens of the graded answer, its trace included."
    )
    judge_tokens: int = Field(
        1024, ge=16, le=32768, description="Tokens of the judge's reply, its reasoning included."
    )
    attempts: int = Field(
        3, ge=1, le=10, description="How often the judge is asked until its reply can be read."
    )

    #: What is graded, and the prompt file that says so.
    criteria: ClassVar[tuple[str, ...]]
    prompt_file: ClassVar[str]

    #: Who was cast for it; None: whoever ``judge`` names.
    _role: Role | None = PrivateAttr(None)

    @field_validator("judge")
    @classmethod
    def _is_named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(_NAME_IT)
        return None if value is None else value.strip()

    def with_roles(self, roles: Roles) -> Self:
        if self.judge is not None:
            return self
        if not roles.given("judge"):
            raise self._unjudged()
        # by its name, so that what was measured says who graded it
        cast = self.model_copy(update={"judge": roles.name_of("judge")})
        cast._role = roles.role("judge")
        return cast

    def _unjudged(self) -> RecipeError:
        return RecipeError(f"nobody judges: {_NAME_IT}.", where=f"metric '{self.card.name}'")

    @cached_property
    def grader(self) -> Judge:
        """The judge, opened when it is first wanted."""
        role = self._role
        if role is None:
            if self.judge is None:
                raise self._unjudged()
            role = roles_of().played("judge", self.judge)
        cache = Cache(cache_folder() / "judged")
        return Judge(role, self.criteria, self.judge_tokens, self.attempts, cache)

    @cached_property
    def instructions(self) -> str:
        """What the judge is told, with a place for the exchange."""
        return read_text(self.prompt_file).strip()

    def prompt(self, record: RecordBase) -> Prompt | None:
        # A letter (Choice) and a text without a question (Passage) are nothing to grade.
        return ask(record) if isinstance(record, QA | Dialogue) else None

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        _ = self.grader  # opened now: what is wrong with it is told before anything is asked
        return [self._request(prompt)]

    def follow_up(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Iterable[Request]:
        # Nothing more for this system; but so settle() can ask about all records at once.
        self.grader.note(self._question(prompt, answers))
        return ()

    def settle(self, progress: Progress | None = None) -> None:
        self.grader.ask_noted(progress)

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        return graded_item(self.grader.grades(self._question(prompt, answers)))

    def _request(self, prompt: Prompt) -> Generate:
        return Generate(prompt, Decoding(self.max_new_tokens))

    def _question(self, prompt: Prompt, answers: Answers) -> Prompt:
        text = generated(answers[self._request(prompt)])
        return Prompt.ask(self.instructions.replace(EXCHANGE, exchange(prompt, text)))
