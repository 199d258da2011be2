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

The HTTP client is httpx2, the maintained successor of httpx (whose last release is of 2024): the
Hugging Face hub client brings it along already, so that this extra adds next to nothing, while
the ``openai`` package would add a client of every product of that company.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from delible.errors import MissingExtraError, ModelError, nearest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.systems.completions import (
    CallError,
    check_error,
    complaint,
    may_pass,
    said,
    wanted_wait,
)
from delible.systems.thoughts import parted

T = TypeVar("T")

#: Where the key is looked for, in this order.
KEY_VARIABLES = ("DELIBLE_API_KEY", "OPENAI_API_KEY")
#: Stop texts that servers take at most; more are cut off here.
STOPS = 4
#: No wait between two attempts is longer, whatever a server asks for.
LONGEST_WAIT_SECONDS = 60.0
#: Characters of a server's message that an error repeats.
TOLD_CHARACTERS = 300
#: An idle connection is closed before the server does it in the middle of the next request.
KEPT_ALIVE_SECONDS = 1.0

#: Tokens that a model which thinks may think, besides those of its answer.
ROOM_TO_THINK = 2048
#: Names of the limit of an answer's length, the common one first.
LIMITS = ("max_tokens", "max_completion_tokens")
#: Options without which a question is still the same question.
OPTIONS = (*LIMITS, "temperature", "top_p", "seed", "stop")

_CHAT, _TEXT = "/chat/completions", "/completions"


class Endpoint(BlackBox):
    """Any OpenAI-compatible server.

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
        stable: The answers never change as long as address and model name stay the same, so they
            may be cached. Off by default: an endpoint may change at any time.

    Raises:
        ModelError: The address cannot be one, or ``key_variable`` is not set.
        MissingExtraError: httpx2 or tenacity is not installed.
    """

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
        stable: bool = False,
    ) -> None:
        self.url = _address(url)
        self.model = model or ""
        self.name = f"{self.model} at {self.url}"
        self.concurrency, self.attempts = concurrency, attempts
        self.timeout_seconds, self.backoff_seconds = timeout_seconds, backoff_seconds
        self.prefill_body, self.stable = dict(prefill_body or {}), stable
        self.key_name, key = _key(key_variable)
        self._hidden = key
        #: What was not asked as it was meant, for people.
        self.notes: list[str] = []
        self._refused: frozenset[str] = frozenset()
        self._thinks = self._reached = False
        try:
            self._http: Any = import_module("httpx2")
            self._tenacity: Any = import_module("tenacity")
        except ImportError:
            raise MissingExtraError("asking an endpoint", "endpoint") from None
        self._client: Any = self._http.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_seconds,
            limits=self._http.Limits(
                max_connections=concurrency, keepalive_expiry=KEPT_ALIVE_SECONDS
            ),
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    @property
    def fingerprint(self) -> str | None:
        """None, so that nothing is cached; with ``stable`` address, model and request fields."""
        if not self.stable:
            return None
        content = ["endpoint", self.url, self.model, self.prefill_body]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    # ---- before the first question

    def check(self) -> None:
        """Asks for one token, and finds the model's name if none was given.

        Raises:
            ModelError: The server cannot be reached, refuses the key, or does not know the model.
        """
        self.model = self.model or self._only_model()
        self.name = f"{self.model} at {self.url}"
        try:
            self._adapting(_CHAT, Prompt.ask("Hello"), Decoding(1), lambda content: content)
        except CallError as failed:
            raise self._told(failed) from None

    def _only_model(self) -> str:
        try:
            names = self._patiently(self._models)
        except CallError as failed:
            raise self._told(failed) from None
        if len(names) != 1:
            raise ModelError(
                "the name of the model is missing.",
                where=self.url,
                hint=f"Add --model NAME. It serves: {', '.join(names[:20]) or 'none it lists'}.",
            )
        return names[0]

    def _models(self) -> list[str]:
        content = self._send("GET", "/models", None)
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
                names = self._models()
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
        if not prompts:
            return []
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            answers = list[str | NoAnswer]()
            for answer in pool.map(lambda prompt: self._answer(prompt, decoding), prompts):
                answers.append(answer)
                if self.on_answers is not None:
                    self.on_answers(1)
            return answers

    def _answer(self, prompt: Prompt, decoding: Decoding) -> str | NoAnswer:
        path = _CHAT if prompt.text is None else _TEXT
        try:
            text = self._adapting(path, prompt, decoding, said)
        except CallError as failed:
            return NoAnswer(self._hide(failed.reason))
        thoughts, answer = parted(text)
        if prompt.prefill and answer.startswith(prompt.prefill):
            answer = answer.removeprefix(prompt.prefill)  # some servers repeat it
        for one in decoding.stop:
            answer = answer.partition(one)[0]
        return (thoughts + answer).strip()

    def _adapting(
        self, path: str, prompt: Prompt, decoding: Decoding, read: Callable[[Any], T]
    ) -> T:
        """What is read off the reply, without the options that the server refuses."""
        refused, thinks = self._refused, self._thinks
        while True:
            body = self._body(prompt, decoding, refused, thinks)
            try:
                found = self._patiently(partial(self._read, path, body, read))
            except CallError as failed:
                if failed.thinking and not thinks:
                    thinks = True
                elif option := _refused_option(failed, body):
                    refused |= {option}
                else:
                    self._learn(frozenset(), failed.thinking)
                    raise
                continue
            self._learn(refused, thinks)
            return found

    def _read(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        return read(self._post(path, body))

    def _learn(self, refused: frozenset[str], thinks: bool) -> None:
        """Keeps what made a question answerable, and notes it once."""
        for option in sorted(refused - self._refused - {LIMITS[0]}):
            self._note(
                f"The server refuses the option '{option}', so it was left out: its own setting "
                "holds, and another run may give other answers."
            )
        if thinks and not self._thinks:
            self._note(
                f"The model thinks before it answers: it was given {ROOM_TO_THINK:,} more tokens "
                "for it. Thoughts that it shows are judged as part of the answer."
            )
        self._refused |= refused
        self._thinks |= thinks

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _body(
        self, prompt: Prompt, decoding: Decoding, refused: frozenset[str], thinks: bool
    ) -> dict[str, Any]:
        names = LIMITS if prompt.text is None else LIMITS[:1]
        limit = next((name for name in names if name not in refused), None)
        options: dict[str, Any] = {"temperature": decoding.temperature}
        if limit is not None:
            options[limit] = decoding.max_new_tokens + (ROOM_TO_THINK if thinks else 0)
        if decoding.temperature > 0:
            options |= {"top_p": decoding.top_p, "seed": decoding.seed}
        if decoding.stop and not thinks:  # a thought holds any stop text; they cut the answer here
            options["stop"] = list(decoding.stop[:STOPS])
        options = {name: value for name, value in options.items() if name not in refused}
        body: dict[str, Any] = {"model": self.model, **options}
        if prompt.text is not None:
            return {**body, "prompt": prompt.text + prompt.prefill}
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        if prompt.prefill:
            turns.append({"role": "assistant", "content": prompt.prefill})
            body |= self.prefill_body
        return {**body, "messages": turns}

    # ---- one call

    def _patiently(self, call: Callable[[], T]) -> T:
        """The result of a call that is repeated while another attempt may succeed."""
        attempt = 0

        def counted() -> T:
            nonlocal attempt
            attempt += 1
            return call()

        again = self._tenacity.Retrying(
            stop=self._tenacity.stop_after_attempt(self.attempts),
            retry=self._tenacity.retry_if_exception(
                lambda error: isinstance(error, CallError) and error.again
            ),
            wait=self._wait,
            sleep=time.sleep,
            reraise=True,
        )
        try:
            return again(counted)  # type: ignore[no-any-return]
        except CallError as failed:
            if not failed.again:
                raise
            reason = f"{failed.reason}, {attempt} attempts"
            raise CallError(reason, failed.status) from None

    def _wait(self, state: Any) -> float:
        """Seconds before the next attempt: what the server asks for, or twice the last wait."""
        wait = self.backoff_seconds * 2 ** (state.attempt_number - 1)
        # drawn apart from all other randomness: callers must not wait in step
        wait *= random.SystemRandom().uniform(0.75, 1.25)
        failed = state.outcome.exception()
        return float(min(max(wait, failed.wait), LONGEST_WAIT_SECONDS))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            reply = self._client.request(method, self.url + path, json=body)
        except self._http.TimeoutException:
            reason = f"no answer within {self.timeout_seconds:g} seconds"
            raise CallError(reason, again=True) from None
        except self._http.HTTPError as error:
            # a server that never answered is a wrong address; one that did may come back
            again = self._reached or not isinstance(error, self._http.ConnectError)
            reason = f"the connection failed ({self._safe(str(error)) or type(error).__name__})"
            raise CallError(reason, again=again) from None
        self._reached = True
        status = int(reply.status_code)
        if 300 <= status < 400:
            place = self._safe(str(reply.headers.get("location", "")))
            raise CallError(f"the server moved to {place}: give that address", status)
        if status >= 400:
            reason = f"the server says {status}: {self._safe(complaint(reply.text))}"
            raise CallError(
                reason,
                status,
                again=may_pass(status, reply.text),
                wait=wanted_wait(reply.headers),
            )
        try:
            content = reply.json()
        except ValueError:
            # one that begins as JSON was cut off on its way
            cut = reply.text.lstrip().startswith("{")
            reason = f"the reply is not JSON: {self._safe(reply.text)}"
            raise CallError(reason, status, again=cut) from None
        try:
            check_error(content)
        except CallError as failed:
            failed.reason = self._safe(failed.reason)
            raise
        return content

    def _hide(self, text: str) -> str:
        """A text without the key, which some servers repeat."""
        return text.replace(self._hidden, "[key]") if self._hidden else text

    def _safe(self, text: str) -> str:
        """A server's words, without the key, and not too many."""
        joined = " ".join(self._hide(text).split())
        return joined if len(joined) <= TOLD_CHARACTERS else f"{joined[:TOLD_CHARACTERS]} …"


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
