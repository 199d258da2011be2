"""A model behind an OpenAI-compatible server, as a system: it answers and gives nothing else.

Conversations go to ``/chat/completions``, raw text (``Prompt.text``) to ``/completions``. A
prefilled answer is sent as a last assistant message. Not every server goes on from there: many
begin a new answer. vLLM and SGLang continue it when asked with ``prefill_body={
"continue_final_message": True, "add_generation_prompt": False}``.

A call that fails is never an answer. Rate limits, server errors, timeouts and dropped connections
are tried again, after waits that double or as long as the server asks; what is left then, and
every other failure at once, is a ``NoAnswer`` with its reason. A wrong address and a refused key
are told before the first question. Options that a server refuses (a temperature, a seed, stop
texts) are left out from then on, and models that think get room for it; both is noted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from delible.errors import ModelError, nearest
from delible.system.asks import Decoding, NoAnswer, Prompt, Relayed
from delible.system.base import BlackBox
from delible.system.replies import WITHHELD, Piece, Reply, Unanswered
from delible.systems.calls import Server
from delible.systems.completions import CallError, Heard, spoken, tools, turn

T = TypeVar("T")
#: What asks a path with a body.
Call = Callable[[str, Mapping[str, Any]], Awaitable[T]]

#: Where the key is looked for, in this order.
KEY_VARIABLES = ("DELIBLE_API_KEY", "OPENAI_API_KEY")
#: Stop texts that servers take at most; more are cut off here.
STOPS = 4

#: Tokens that a model which thinks may think, besides those of its answer.
ROOM_TO_THINK = 2048
#: Names of the limit of an answer's length, the common one first.
LIMITS = ("max_tokens", "max_completion_tokens")
#: Options without which a question is still the same question.
OPTIONS = (*LIMITS, "temperature", "top_p", "seed", "stop", "logprobs", "stream_options")
#: Those that change no answer: they are left out without a note.
_SILENT = frozenset({LIMITS[0], "logprobs", "stream_options"})

_CHAT, _TEXT = "/chat/completions", "/completions"


class Endpoint(BlackBox):
    """Any OpenAI-compatible server, asked in batches or by many at once.

    Args:
        url: Where the API is, usually ending in ``/v1``.
        model: Name of the model there; None: the only one that the server lists.
        concurrency: Requests under way at once.
        timeout_seconds: Without a byte from the server after which an attempt is given up.
        attempts: Attempts per question, for failures that may pass.
        backoff_seconds: Wait after the first failed attempt; it doubles.
        key_variable: Environment variable with the API key; None: the first of
            :data:`KEY_VARIABLES` that is set. Without one no key is sent. The key is kept in
            memory only.
        prefill_body: Fields added to requests with a prefilled answer.
        logprobs: Replies have the log-probabilities of their tokens, where the server gives them.
        stable: The answers never change as long as address and model name stay the same, so they
            may be cached. Off by default: an endpoint may change at any time.

    Raises:
        ModelError: The address cannot be one, or ``key_variable`` is not set.
        MissingExtraError: httpx2 is not installed.
    """

    #: Of the protocol: whether the model behind it uses tools and sees, its answers show.
    capabilities = frozenset({"generate", "tools", "images"})
    on_answers: Callable[[int], None] | None = None

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        concurrency: int = 4,
        timeout_seconds: float = 60.0,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
        key_variable: str | None = None,
        prefill_body: Mapping[str, Any] | None = None,
        logprobs: bool = False,
        stable: bool = False,
    ) -> None:
        self.url = _address(url)
        self.model = model or ""
        self.name = f"{self.model} at {self.url}"
        self.prefill_body, self.logprobs = dict(prefill_body or {}), logprobs
        self.stable = stable
        self.key_name, key = _key(key_variable)
        self.server = Server(
            self.url,
            key,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            backoff_seconds=backoff_seconds,
        )
        #: Whether options that it refuses are left out from then on. Not where the options are
        #: those of many clients: what one of them got wrong must not change the others' answers.
        self.adapts = True
        #: What was not asked as it was meant, for people.
        self.notes: list[str] = []
        self._refused: frozenset[str] = frozenset()
        self._thinks = False

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    @property
    def fingerprint(self) -> str | None:
        """None, so that nothing is cached; with ``stable`` address, model and request fields."""
        if not self.stable:
            return None
        content = ["endpoint", self.url, self.model, self.prefill_body]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        await self.server.aclose()

    # ---- before the first question

    def check(self) -> None:
        """Asks for one token, and finds the model's name if none was given.

        Raises:
            ModelError: The server cannot be reached, refuses the key, or does not know the model.
        """
        self.model = self.model or self._only_model()
        self.name = f"{self.model} at {self.url}"
        try:
            self.server.finished(self._adapting(Prompt.ask("Hello"), Decoding(1), self.server.post))
        except CallError as failed:
            raise self._told(failed) from None

    def _only_model(self) -> str:
        try:
            names = self.server.finished(self.server.patiently(self._models))
        except CallError as failed:
            raise self._told(failed) from None
        if len(names) != 1:
            raise ModelError(
                "the name of the model is missing.",
                where=self.url,
                hint=f"Add --model NAME. It serves: {', '.join(names[:20]) or 'none it lists'}.",
            )
        return names[0]

    async def _models(self) -> list[str]:
        content = await self.server.get("/models")
        listed = content.get("data") if isinstance(content, dict) else None
        found = listed if isinstance(listed, list) else []
        return sorted(str(one["id"]) for one in found if isinstance(one, dict) and "id" in one)

    def _told(self, failed: CallError) -> ModelError:
        """Why nothing can be asked, in the user's terms."""
        hint: str | None
        if failed.status in (401, 403):
            sent = f"the key in ${self.key_name}" if self.key_name else "a request without a key"
            return ModelError(
                f"the server refuses {sent} ({failed.reason}).",
                where=self.url,
                hint=f"Put the key into ${KEY_VARIABLES[0]}.",
            )
        if failed.status in (400, 404) and self.model:
            try:
                names = self.server.finished(self._models())
            except CallError:
                names = []
            if names and self.model not in names:
                return ModelError(
                    f"the server has no model '{self.model}'.",
                    where=self.url,
                    hint=nearest(self.model, names),
                )
        if failed.status in (None, 404, 405):
            hint = "Give the address before /chat/completions; it usually ends in /v1."
        else:
            hint = None
        return ModelError(
            f"the endpoint does not answer: {failed.reason}.", where=self.url, hint=hint
        )

    # ---- answers

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers in the order of the prompts; a ``NoAnswer`` for every call that failed."""
        answers: list[str | NoAnswer] = [NoAnswer("it was not asked")] * len(prompts)
        left = iter(enumerate(prompts))

        async def ask() -> None:
            for index, prompt in left:
                answers[index] = await self._answer(prompt, decoding)
                if self.on_answers is not None:
                    self.on_answers(1)

        async def every() -> None:
            await asyncio.gather(
                *(ask() for _ in range(min(self.server.concurrency, len(prompts))))
            )

        self.server.finished(every())
        return answers

    async def _answer(self, prompt: Prompt, decoding: Decoding) -> str | NoAnswer:
        try:
            reply = await self.respond(prompt, decoding)
        except Unanswered as failed:
            return NoAnswer(failed.problem)
        if reply.tool_calls and not reply.text:
            return NoAnswer("it calls tools and says nothing")
        if reply.finish == "content_filter" and not reply.text:
            return NoAnswer(WITHHELD)
        return reply.text

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer; cancelling the call closes its connection.

        Raises:
            Unanswered: There is none, with the reason.
        """
        try:
            reply = await self._adapting(prompt, decoding, self._whole)
        except CallError as failed:
            raise self._unanswered(failed) from None
        return replace(reply, text=spoken(reply.text, prompt, decoding))

    async def _whole(self, path: str, body: Mapping[str, Any]) -> Reply:
        heard = Heard()
        heard.add(await self.server.post(path, body))
        return heard.reply()

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer as it comes; closing the iterator closes the connection.

        Until the first event a call is tried again like any other; after it nothing is.

        Raises:
            Unanswered: There is none, or it broke off.
        """
        heard, told, logged = Heard(streamed=True), "", 0
        try:
            event, following = await self._adapting(prompt, decoding, self.server.begin, True)
            async with aclosing(following):
                while event is not None:
                    calls = heard.add(event)
                    text = spoken(heard.text, prompt, decoding, done=False)
                    if calls or len(text) > len(told):
                        new, logged = tuple(heard.logprobs[logged:]), len(heard.logprobs)
                        yield Piece(text[len(told) :], tool_calls=calls, logprobs=new)
                        told = max(told, text, key=len)
                    event = await anext(following, None)
        except CallError as failed:
            if not heard.ended:  # else only what follows the answer is missing
                raise self._unanswered(failed) from None
        try:
            reply = heard.reply()
        except CallError as failed:
            raise self._unanswered(failed) from None
        rest = spoken(reply.text, prompt, decoding)[len(told) :]
        yield Piece(rest, reply.finish, reply.usage, logprobs=tuple(heard.logprobs[logged:]))

    def _unanswered(self, failed: CallError) -> Unanswered:
        self._learn(frozenset(), failed.thinking)
        reason = self.server.hide(failed.reason)
        return Unanswered(reason, status=failed.status, wait_seconds=failed.wait)

    async def _adapting(
        self, prompt: Prompt, decoding: Decoding, call: Call[T], streamed: bool = False
    ) -> T:
        """What the server replies, without the options that it refuses."""
        path = _CHAT if prompt.text is None else _TEXT
        refused, thinks = self._refused, self._thinks
        while True:
            body = self._body(prompt, decoding, refused, thinks, streamed)
            try:
                found = await self.server.patiently(call, path, body)
            except CallError as failed:
                if self.adapts and failed.thinking and not thinks:
                    thinks = True
                elif self.adapts and (option := _refused_option(failed, body)):
                    refused |= {option}
                else:
                    raise
                continue
            self._learn(refused, thinks)
            return found

    def _learn(self, refused: frozenset[str], thinks: bool) -> None:
        """Keeps what made a question answerable, and notes it once."""
        for option in sorted(refused - self._refused - _SILENT):
            self._note(
                f"The server refuses the option '{option}', so it was left out: its own setting "
                "holds, and another run may give other answers."
            )
        if thinks and self.adapts and not self._thinks:
            self._note(
                f"The model thinks before it answers: it was given {ROOM_TO_THINK:,} more tokens "
                "for it. Thoughts that it shows are judged as part of the answer."
            )
        self._refused |= refused
        self._thinks |= thinks and self.adapts

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _body(
        self,
        prompt: Prompt,
        decoding: Decoding,
        refused: frozenset[str],
        thinks: bool,
        streamed: bool,
    ) -> dict[str, Any]:
        chat = prompt.text is None
        names = LIMITS if chat else LIMITS[:1]
        limit = next((name for name in names if name not in refused), None)
        options: dict[str, Any] = {"temperature": decoding.temperature}
        if limit is not None:
            options[limit] = decoding.max_new_tokens + (ROOM_TO_THINK if thinks else 0)
        if decoding.temperature > 0:
            options |= {"top_p": decoding.top_p, "seed": decoding.seed}
        if decoding.stop and not thinks:  # a thought holds any stop text; they cut the answer here
            options["stop"] = list(decoding.stop[:STOPS])
        if self.logprobs:
            options["logprobs"] = True if chat else 1
        if streamed:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        options = {name: value for name, value in options.items() if name not in refused}
        if isinstance(decoding, Relayed):
            options |= json.loads(decoding.fields)
            options = {name: value for name, value in options.items() if value is not None}
        body: dict[str, Any] = {"model": self.model, **options}
        if prompt.text is not None:
            return {**body, "prompt": prompt.text + prompt.prefill}
        turns = [turn(message) for message in prompt.messages]
        if prompt.prefill:
            turns.append({"role": "assistant", "content": prompt.prefill})
            body |= self.prefill_body
        return {**body, "messages": turns, **tools(prompt)}


def _address(url: str) -> str:
    """The address that paths are added to.

    Raises:
        ModelError: It is none, or holds what must not be written down.
    """
    parts = urlsplit(url)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(
            "this is no address of a server.",
            where=shown,
            hint="It looks like https://host/v1 or http://localhost:8000/v1.",
        )
    if "@" in parts.netloc or parts.query:
        raise ModelError(
            "an address with a key, a password or a query in it would end in manifests.",
            where=shown,
            hint=f"Put the key into ${KEY_VARIABLES[0]} and give the plain address.",
        )
    return shown.rstrip("/").removesuffix(_CHAT).removesuffix(_TEXT).rstrip("/")


def _key(variable: str | None) -> tuple[str | None, str]:
    """The name of the variable that holds the key, and the key."""
    for name in (variable,) if variable else KEY_VARIABLES:
        if key := os.environ.get(name, "").strip():
            return name, key
    if variable:
        raise ModelError(f"the environment variable {variable} is not set, or is empty.")
    return None, ""


def _refused_option(failed: CallError, body: Mapping[str, Any]) -> str | None:
    """The option that a server's complaint names, among those that were sent."""
    if failed.status not in (400, 422):
        return None
    text = failed.reason
    if LIMITS[0] in body and LIMITS[1] in text:
        return LIMITS[0]
    return next((one for one in OPTIONS if one in body and re.search(rf"\b{one}\b", text)), None)
