"""Calls to an OpenAI-compatible server: connections, failures, attempts, streams.

The HTTP client is httpx2, the maintained successor of httpx: the Hugging Face hub client brings it
along already. The ``openai`` package is built on it as well, but its own retries know neither a
failure in a reply with status 200, nor a quota that no waiting lifts, nor status 425, and it sends
a key and headers of its own unless each is switched off. What it would save is a dozen lines that
split a stream into events.
"""

from __future__ import annotations

import asyncio
import json
import random
from asyncio import sleep
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from delible.errors import MissingExtraError
from delible.systems.completions import (
    CallError,
    check_error,
    complaint,
    events,
    may_pass,
    wanted_wait,
)

T = TypeVar("T")
#: No wait between two attempts is longer, whatever a server asks for.
LONGEST_WAIT_SECONDS = 60.0
#: Characters of a server's message that an error repeats.
TOLD_CHARACTERS = 300
#: Bytes of a whole reply, or of one event, beyond which a server is no longer listened to.
LONGEST_REPLY_BYTES = 8 * 2**20
#: An idle connection is closed before the server does it in the middle of the next request.
KEPT_ALIVE_SECONDS = 1.0


class Server:
    """A server that is called, from any event loop.

    Args:
        url: Where the API is.
        key: Sent with every call; empty: none is.
        concurrency: Connections at once.
        timeout_seconds: Without a byte from the server after which an attempt is given up.
        attempts: Attempts per call, for failures that may pass.
        backoff_seconds: Wait after the first failed attempt; it doubles.

    Raises:
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        concurrency: int,
        timeout_seconds: float,
        attempts: int,
        backoff_seconds: float,
    ) -> None:
        self.url, self._key = url, key
        self.concurrency, self.timeout_seconds = concurrency, timeout_seconds
        self.attempts, self.backoff_seconds = attempts, backoff_seconds
        #: Without a connection after which an attempt is given up.
        self.connect_seconds = timeout_seconds
        self._reached = False
        try:
            self._http: Any = import_module("httpx2")
        except ImportError:
            raise MissingExtraError("asking an endpoint", "endpoint") from None
        self._trust: Any = self._http.create_ssl_context()
        #: One client for each event loop: connections cannot leave theirs.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def finished(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that has an event loop, and connections, of its own."""

        async def closing() -> T:
            try:
                return await work
            finally:
                await self.aclose()

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(closing())
        with ThreadPoolExecutor(1) as thread:  # as in a notebook: this thread's loop is taken
            return thread.submit(asyncio.run, closing()).result()

    async def patiently(self, call: Callable[..., Awaitable[T]], *given: Any) -> T:
        """The result of a call that is repeated while another attempt may succeed."""
        attempt = 1
        while True:
            try:
                return await call(*given)
            except CallError as failed:
                if not failed.again:
                    raise
                if attempt >= self.attempts:
                    failed.reason += f", {attempt} attempts"
                    raise
                await sleep(self._wait(attempt, failed.wait))
            attempt += 1

    def _wait(self, attempt: int, wanted: float) -> float:
        """Seconds before the next attempt: what the server asks for, or twice the last wait."""
        wait = self.backoff_seconds * 2 ** (attempt - 1)
        # drawn apart from all other randomness: callers must not wait in step
        wait *= random.SystemRandom().uniform(0.75, 1.25)
        return min(max(wait, wanted), LONGEST_WAIT_SECONDS)

    async def get(self, path: str) -> Any:
        """The content of a reply to a question without a body.

        Raises:
            CallError: There is none.
        """
        return self._read(await self._whole("GET", path))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The content of a whole reply.

        Raises:
            CallError: There is none.
        """
        return self._read(await self._whole("POST", path, body))

    async def begin(self, path: str, body: Mapping[str, Any]) -> tuple[Any, AsyncGenerator[Any]]:
        """The content of a stream's first event, and of those that follow.

        Raises:
            CallError: There is none.
        """
        following = self._events(await self._send("POST", path, body))
        return await anext(following, None), following

    async def _events(self, reply: Any) -> AsyncGenerator[Any]:
        """What a server sends, event by event; one that does not stream sends a whole reply."""
        try:
            if "event-stream" in reply.headers.get("content-type", ""):
                async for text in events(reply.aiter_bytes(), LONGEST_REPLY_BYTES):
                    yield self._read(text)
            else:
                yield self._read(await self._text(reply))
        except self._http.HTTPError as error:
            raise self._failed(error) from None
        finally:
            await reply.aclose()

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> str:
        reply = await self._send(method, path, body)
        try:
            return await self._text(reply)
        except self._http.HTTPError as error:
            raise self._failed(error) from None
        finally:
            await reply.aclose()

    async def _text(self, reply: Any) -> str:
        """A reply's body, unless it is longer than anyone answers."""
        found = bytearray()
        async for chunk in reply.aiter_bytes():
            found += chunk
            if len(found) > LONGEST_REPLY_BYTES:
                raise CallError(f"the reply is longer than {LONGEST_REPLY_BYTES:,} bytes")
        return found.decode(reply.encoding or "utf-8", errors="replace")

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The head of a server's reply that is no failure; whoever reads it closes it."""
        client = self._client()
        try:
            request = client.build_request(method, self.url + path, json=body)
            reply = await client.send(request, stream=True)
            self._reached = True
            status = int(reply.status_code)
            if status < 300:
                return reply
            try:
                text = await self._text(reply)
            finally:
                await reply.aclose()
        except self._http.HTTPError as error:
            raise self._failed(error) from None
        if status < 400:
            place = self.safe(str(reply.headers.get("location", "")))
            raise CallError(f"the server moved to {place}: give that address", status)
        reason = f"the server says {status}: {self.safe(complaint(text))}"
        wait = wanted_wait(reply.headers)
        raise CallError(reason, status, again=may_pass(status, text), wait=wait)

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = self._http.AsyncClient(
                # what is sent packed would have to be unpacked before its length is known
                headers={
                    "Accept-Encoding": "identity",
                    **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                },
                timeout=self._http.Timeout(
                    self.timeout_seconds, connect=self.connect_seconds, pool=None
                ),
                limits=self._http.Limits(
                    max_connections=self.concurrency, keepalive_expiry=KEPT_ALIVE_SECONDS
                ),
                verify=self._trust,
            )
        return self._clients[loop]

    def _failed(self, error: Exception) -> CallError:
        if isinstance(error, self._http.TimeoutException):
            return CallError(f"no answer within {self.timeout_seconds:g} seconds", again=True)
        # a server that never answered is a wrong address; one that did may come back
        again = self._reached or not isinstance(error, self._http.ConnectError)
        reason = f"the connection failed ({self.safe(str(error)) or type(error).__name__})"
        return CallError(reason, again=again)

    def _read(self, text: str) -> Any:
        """The content of a reply or an event that tells of no failure."""
        try:
            content = json.loads(text)
        except ValueError:
            # one that begins as JSON was cut off on its way
            cut = text.lstrip().startswith("{")
            raise CallError(f"the reply is not JSON: {self.safe(text)}", 200, again=cut) from None
        try:
            check_error(content)
        except CallError as failed:
            failed.reason = self.safe(failed.reason)
            raise
        return content

    def hide(self, text: str) -> str:
        """A text without the key, which some servers repeat."""
        return text.replace(self._key, "[key]") if self._key else text

    def safe(self, text: str) -> str:
        """A server's words, without the key, and not too many."""
        joined = " ".join(self.hide(text).split())
        return joined if len(joined) <= TOLD_CHARACTERS else f"{joined[:TOLD_CHARACTERS]} …"
