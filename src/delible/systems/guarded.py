"""A guarded system. A guard stands before a system, sees the conversation, may answer itself.

It is asked in batches and by many at once, whole or streaming, and judges alike. It fails closed:
a judgement that breaks down, takes too long or cannot be read is a refusal like any other, so that
nobody learns by what a guard is broken; its reply is marked ``guard_failed`` for whoever runs it,
and what it was about is told to nobody: not to the log, and in no error.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NoReturn, cast

from pydantic import Field

from delible import prompts as prompt_files
from delible.component import build
from delible.context import NO_CONTEXT, Context
from delible.errors import RunError
from delible.method import ComponentMethod, Outcome
from delible.records import ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, Responder, System, identity_of
from delible.system.replies import Piece, Reply, Unanswered
from delible.system.role import RoleName
from delible.systems.captions import CaptionedMind
from delible.systems.judged_text import Called, told, told_in_batch
from delible.systems.judging import (
    Course,
    Decision,
    Forward,
    Judged,
    Reading,
    Refuse,
    Say,
    settle,
    settle_all,
)
from delible.systems.mind import GuardMind as GuardMind
from delible.systems.serving import responder
from delible.systems.withholding import last_piece, reply_of

logger = logging.getLogger(__name__)

#: Why a conversation with pictures is not answered.
NO_PICTURES = "the guard judges texts, not pictures"
#: What is told of a failure whose words the guard does not let pass.
NOTHING_TOLD = "what is guarded gave no answer"


@dataclass(frozen=True)
class Guarding:
    """A guard, what it goes by, and whom it was told to consult: what is kept of it."""

    guard: Guard
    request: ForgetRequest
    roles: Mapping[str, Any] = field(default_factory=dict)


class Guard(ComponentMethod):
    """A guard's options; :meth:`prepare` makes it ready for a forget request."""

    gives_scores, needs_model = False, False
    #: Parts that it consults by talking; the guarded system plays those that nobody was given for.
    consults: ClassVar[tuple[RoleName, ...]] = ()
    #: Recipe that the guarded model must have gone through before; None: any model will do.
    taught: ClassVar[str | None] = None

    timeout_seconds: float = Field(
        30.0, gt=0, description="A judgement that takes longer is a refusal (when serving)."
    )
    refusal: str | None = Field(
        None, pattern=r"\S", description="The refusal; None: one of the built-in hundred a prompt."
    )

    @property
    def refusals(self) -> tuple[str, ...]:
        """What is said instead of an answer."""
        return (self.refusal,) if self.refusal else prompt_files.read_lines("refusals.txt")

    def prepare(self, request: ForgetRequest, context: Context = NO_CONTEXT) -> GuardMind:
        """Builds whatever the guard needs to judge (automata, indexes).

        Args:
            request: What must not come out.
            context: Who judges or writes for it by talking, and the seed.
        """
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        guarded, named = self.put_before(system, request, context), context.roles.named()
        parts = [part for part in (*self.consults, "captioner") if part in named]
        made = Guarding(self, request, {str(part): named[part] for part in parts})
        return Outcome(guarded, "guard", made, notes=dict(guarded.mind.notes))

    def put_before(
        self, system: System, request: ForgetRequest, context: Context = NO_CONTEXT
    ) -> GuardedSystem:
        """The guard, made ready, before a system.

        Raises:
            DelibleError: As for :meth:`prepare`.
        """
        seated = self.seated(system, context)
        mind = self.prepare(request, seated)
        if not mind.sees_pictures and seated.roles.given("captioner"):
            mind = CaptionedMind(mind, seated.roles.role("captioner"))
        return GuardedSystem(system, mind, self.name, self.timeout_seconds)

    def seated(self, system: System, context: Context) -> Context:
        """The context in which the system itself is there, and whom the guard consults."""
        roles = context.roles.with_itself(system, self.consults)
        return replace(context, roles=roles, itself=system)


class GuardedSystem(BlackBox):
    """A system with a guard in front. It generates, and gives away nothing white-box.

    Args:
        system: What is guarded: a model, an endpoint, another guarded system.
        mind: The guard at work. May be exchanged at any time: each request keeps the one that it
            began with.
        guard: The guard's name.
        timeout_seconds: A judgement that takes longer is a refusal, when serving.
    """

    def __init__(
        self, system: System, mind: GuardMind, guard: str, timeout_seconds: float = 30.0
    ) -> None:
        self.system, self.mind, self.guard = system, mind, guard
        self.timeout_seconds = timeout_seconds
        self.name = f"{system.name} + {guard}"
        passed = {"generate", "tools"} | ({"images"} if mind.sees_pictures else set())
        self.capabilities = frozenset(system.capabilities & passed | {"generate"})
        self._responders: dict[int, tuple[System, Responder]] = {}

    @property
    def fingerprint(self) -> str | None:
        return self._told(self.system.fingerprint, [one.fingerprint for one in self.mind.consulted])

    @property
    def identity(self) -> str | None:
        """The same on every machine."""
        return self._told(identity_of(self.system), [identity_of(o) for o in self.mind.consulted])

    def _told(self, inner: str | None, consulted: Sequence[str | None]) -> str | None:
        """All that its answers depend on; None if something of it is not known."""
        if inner is None or None in consulted:
            return None
        return "+".join([inner, self.mind.fingerprint, *(str(one) for one in consulted)])

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

    # ---- in batches

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers; a prompt that the guard answers never reaches the system."""
        found = self.replies(prompts, decoding)
        return [one if isinstance(one, NoAnswer) else one.text for one in found]

    def replies(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Reply | NoAnswer]:
        """As :meth:`generate`, with why each answer ended: ``content_filter`` if it was refused."""
        mind = self.mind
        found: dict[int, Reply | NoAnswer] = {}
        seen = [place for place, prompt in enumerate(prompts) if not self._unseen(mind, prompt)]
        for place in range(len(prompts)):
            found[place] = NoAnswer(NO_PICTURES)
        groups: dict[int, tuple[System, list[tuple[int, Prompt]]]] = {}
        courses = settle_all([partial(mind.before, prompts[place]) for place in seen])
        for place, course in zip(seen, courses, strict=True):
            decision = self._decision(mind, prompts[place], course)
            if isinstance(decision, Refuse | Say):
                found[place] = reply_of(decision, self.guard)
                continue
            asked = decision or Forward(prompts[place])
            system = asked.system or self.system
            groups.setdefault(id(system), (system, []))[1].append((place, asked.prompt))
        for system, asks in groups.values():
            answers = system.generate([prompt for _, prompt in asks], decoding)
            places = [place for place, _ in asks]
            judged = self._judged(mind, [prompts[place] for place in places], answers)
            found.update(zip(places, judged, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _judged(
        self, mind: GuardMind, prompts: Sequence[Prompt], answers: Sequence[str | NoAnswer]
    ) -> list[Reply | NoAnswer]:
        texts = [
            answer.reason if isinstance(answer, NoAnswer) else told_in_batch(prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        courses = settle_all(
            [
                partial(Reading(mind, prompt).read, text, ended=True)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        )
        found: list[Reply | NoAnswer] = []
        for prompt, answer, course in zip(prompts, answers, courses, strict=True):
            decision = self._decision(mind, prompt, course)
            if isinstance(answer, NoAnswer):  # a failed call stays one: only its words are judged
                found.append(answer if decision is None else NoAnswer(NOTHING_TOLD))
            elif isinstance(decision, Refuse | Say):
                found.append(reply_of(decision, self.guard))
            else:
                found.append(Reply(answer))
        return found

    # ---- by many at once

    async def check(self, prompt: Prompt, answer: str | None = None) -> Decision:
        """What the guard decides, without asking the system: about a prompt, then its answer.

        Raises:
            Unanswered: The prompt holds what the guard cannot judge.
        """
        mind = self.mind
        decision = await self._before(mind, prompt)
        if decision is not None or answer is None:
            return decision
        read = partial(Reading(mind, prompt).read, answer, ended=True)
        return await self._settled(mind, prompt, read)

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer; log-probabilities, which tell tokens, are left out.

        Raises:
            Unanswered: There is none, or the prompt holds what the guard cannot judge.
        """
        mind = self.mind
        decision = await self._before(mind, prompt)
        if isinstance(decision, Refuse | Say):
            return reply_of(decision, self.guard)
        asked = decision or Forward(prompt)
        try:
            reply = await self._responder(asked.system or self.system).respond(
                asked.prompt, decoding
            )
        except Exception as error:
            raise await self._unanswered(mind, prompt, error) from None
        read = partial(Reading(mind, prompt).read, told(reply.text, reply.tool_calls), ended=True)
        decision = await self._settled(mind, prompt, read)
        if isinstance(decision, Refuse | Say):
            return replace(reply_of(decision, self.guard), usage=reply.usage)
        return replace(reply, logprobs=None)

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer as far as it is judged; calls of tools come, judged, with the last piece.

        An answer that turns bad ends with the refusal, after what of it had passed.

        Raises:
            Unanswered: There is none, or no more, or the prompt cannot be judged.
        """
        mind = self.mind
        decision = await self._before(mind, prompt)
        if isinstance(decision, Refuse | Say):
            yield last_piece(decision, self.guard)
            return
        asked = decision or Forward(prompt)
        reading, called = Reading(mind, prompt), Called()
        text, sent = "", 0
        inner = self._responder(asked.system or self.system).stream(asked.prompt, decoding)
        async with aclosing(_said(inner)) as pieces:
            while True:
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    raise Unanswered("the answer broke off.") from None
                except Exception as error:
                    raise await self._unanswered(mind, prompt, error) from None
                text += piece.text
                called.add(piece.tool_calls)
                ended = piece.finish is not None
                more = piece.text
                if ended:
                    more += told("", called.calls())
                read = partial(reading.read, more, ended=ended)
                decision = await self._settled(mind, prompt, read, threaded=mind.reads != "words")
                if isinstance(decision, Refuse | Say):
                    passed = text[sent : reading.free]
                    yield last_piece(
                        decision, self.guard, usage=piece.usage, passed=passed, after=sent > 0
                    )
                    return
                free = len(text) if ended else min(reading.free, len(text))
                if free > sent or ended:
                    calls = called.pieces() if ended else ()
                    yield replace(piece, text=text[sent:free], tool_calls=calls, logprobs=())
                    sent = free
                if ended:
                    return

    async def _before(self, mind: GuardMind, prompt: Prompt) -> Decision:
        if self._unseen(mind, prompt):
            raise Unanswered(f"{NO_PICTURES}.")
        return await self._settled(mind, prompt, partial(mind.before, prompt))

    async def _settled(
        self,
        mind: GuardMind,
        prompt: Prompt,
        start: Callable[[], Judged],
        *,
        threaded: bool = True,
    ) -> Decision:
        course = await settle(
            start,
            self._responder,
            self.timeout_seconds,
            threaded=threaded and mind.threaded,
        )
        return self._decision(mind, prompt, course)

    async def _unanswered(self, mind: GuardMind, prompt: Prompt, error: Exception) -> Unanswered:
        """What is told of a failure: its words come from what is guarded, and are judged too."""
        if isinstance(error, Unanswered):
            read = partial(Reading(mind, prompt).read, str(error), ended=True)
            if await self._settled(mind, prompt, read) is None:
                return error
        else:
            logger.warning("what '%s' guards failed (%s).", self.guard, type(error).__name__)
        return Unanswered(f"{NOTHING_TOLD}.")

    def _responder(self, system: System) -> Responder:
        if id(system) not in self._responders:
            self._responders[id(system)] = (system, responder(system))
        return self._responders[id(system)][1]

    # ---- both

    @staticmethod
    def _unseen(mind: GuardMind, prompt: Prompt) -> bool:
        return "images" in prompt.needs and not mind.sees_pictures

    def _decision(self, mind: GuardMind, prompt: Prompt, course: Course) -> Decision:
        """What a judgement came to; one that failed is a refusal, and tells the kind of error."""
        if course.failure is None:
            return course.decision
        kind = type(course.failure).__name__
        logger.warning("the guard '%s' failed (%s) and refused.", self.guard, kind)
        return replace(mind.refuse(prompt), failed=True)


async def _said(pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece]:
    """The pieces; closing this closes them."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


def guard(
    system: System,
    request: ForgetRequest,
    name: str = "target_detector",
    *,
    context: Context | None = None,
    **options: Any,
) -> GuardedSystem:
    """Puts a guard before a system.

    Args:
        system: What is guarded: a model, an endpoint, another guarded system.
        request: What must not come out.
        name: Name of the guard (``delible list guards``).
        context: Who judges or writes for it by talking.
        **options: The guard's options (``delible show NAME``).

    Returns:
        A system that generates and gives no scores; also one that answers many at once.

    Raises:
        RecipeError: An unknown guard or option.
        DataError: The request gives this guard nothing to go by.
    """
    built = cast(Guard, build("guard", {"name": name, **options}))
    return built.put_before(system, request, context or NO_CONTEXT)
