"""A model behind an OpenAI-compatible server, as a system: it answers and gives nothing else.

Conversations go to ``/chat/completions``, raw text (``Prompt.text``) to ``/completions``. A
prefilled answer is sent as a last assistant message. Not every server goes on from there: many
begin a new answer. vLLM and SGLang continue it when asked with ``prefill_body={
"continue_final_message": True, "add_generation_prompt": False}``.

A call that fails is never an answer. Rate limits (429), server errors (5xx) and timeouts are
tried again, after waits that double; what is left then, and every other failure at once, is a
``NoAnswer`` with its reason. A wrong address and a refused key are told before the first question.

The HTTP client is httpx2, the maintained successor of httpx (whose last release is of 2024): the
Hugging Face hub client brings it along already, so that this extra adds next to nothing, while
the ``openai`` package would add a client of every product of that company.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from delible.errors import MissingExtraError, ModelError, nearest
from delible.measure.requests import BlackBox, Decoding, NoAnswer, Prompt

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

_CHAT, _TEXT = "/chat/completions", "/completions"


class _CallError(Exception):
    """A call without an answer.

    Args:
        reason: Why, for people.
        status: The HTTP status, if there was one.
        again: Whether another attempt may succeed.
        wait: Seconds that the server asks to wait.
    """

    def __init__(
        self, reason: str, status: int | None = None, *, again: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.again, self.wait = reason, status, again, wait


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
        MissingExtraError: httpx2 is not installed.
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
        self._limit = "max_tokens"
        try:
            self._http: Any = import_module("httpx2")
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
            try:
                self._probe()
            except _CallError as failed:
                if failed.status != 400 or "max_completion_tokens" not in failed.reason:
                    raise
                self._limit = "max_completion_tokens"  # what newer models call it
                self._probe()
        except _CallError as failed:
            raise self._told(failed) from None

    def _probe(self) -> None:
        self._patiently(lambda: self._post(_CHAT, self._body(Prompt.ask("Hello"), Decoding(1))))

    def _only_model(self) -> str:
        try:
            names = self._patiently(self._models)
        except _CallError as failed:
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

    def _told(self, failed: _CallError) -> ModelError:
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
            except _CallError:
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
        body = self._body(prompt, decoding)
        path = _CHAT if prompt.text is None else _TEXT
        try:
            text = self._patiently(lambda: _said(self._post(path, body)))
        except _CallError as failed:
            return NoAnswer(failed.reason)
        if prompt.prefill and text.startswith(prompt.prefill):
            text = text.removeprefix(prompt.prefill)  # some servers repeat it
        for one in decoding.stop:
            text = text.partition(one)[0]
        return text.strip()

    def _body(self, prompt: Prompt, decoding: Decoding) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            self._limit if prompt.text is None else "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
        }
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "seed": decoding.seed}
        if decoding.stop:
            body["stop"] = list(decoding.stop[:STOPS])
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
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except _CallError as failed:
                if not failed.again:
                    raise
                if attempt == self.attempts:
                    reason = f"{failed.reason}, {attempt} attempts"
                    raise _CallError(reason, failed.status) from None
                # drawn apart from all other randomness: callers must not wait in step
                wait = self.backoff_seconds * 2 ** (attempt - 1)
                wait *= random.SystemRandom().uniform(0.75, 1.25)
                time.sleep(min(max(wait, failed.wait), LONGEST_WAIT_SECONDS))
        raise AssertionError("there is always a first attempt")

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            reply = self._client.request(method, self.url + path, json=body)
        except self._http.TimeoutException:
            reason = f"no answer within {self.timeout_seconds:g} seconds"
            raise _CallError(reason, again=True) from None
        except self._http.HTTPError as error:
            raise _CallError(f"the connection failed ({self._safe(str(error))})") from None
        status = int(reply.status_code)
        if 300 <= status < 400:
            place = self._safe(str(reply.headers.get("location", "")))
            raise _CallError(f"the server moved to {place}: give that address", status)
        if status >= 400:
            reason = f"the server says {status}: {self._safe(_complaint(reply.text))}"
            again = status == 429 or status >= 500
            raise _CallError(reason, status, again=again, wait=_wanted_wait(reply.headers))
        try:
            return reply.json()
        except ValueError:
            raise _CallError(f"the reply is not JSON: {self._safe(reply.text)}", status) from None

    def _safe(self, text: str) -> str:
        """A server's words, without the key that some repeat, and not too many."""
        hidden = text.replace(self._hidden, "[key]") if self._hidden else text
        joined = " ".join(hidden.split())
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


def _said(content: Any) -> str:
    """The text of a completion of either kind.

    Raises:
        _CallError: There is none. An empty text is one, unless it was cut off before it began.
    """
    try:
        choice = content["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        refusal = None if message is None else message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _CallError("the reply is not a completion") from None
    if isinstance(text, list):  # parts, as some servers send them
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    text = text if isinstance(text, str) and text else refusal or text
    ended = choice.get("finish_reason")
    if not isinstance(text, str) or (not text and ended == "length"):
        raise _CallError(f"the reply has no text (finish reason '{ended}')")
    return text


def _complaint(text: str) -> str:
    """What an error reply says, in its own words."""
    try:
        content = json.loads(text)
    except ValueError:
        return text
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _wanted_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait; dates are not read."""
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
