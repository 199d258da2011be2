"""A gateway in a thread, systems that say what a test writes, and a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx2

from delible.gateway.models import ServedModel
from delible.gateway.running import listening, server
from delible.gateway.settings import GatewaySettings
from delible.system.asks import Decoding, Prompt
from delible.system.replies import Piece, Reply, Unanswered, Usage
from delible.systems.endpoint import Endpoint

#: A line of a script: a piece, seconds to wait, or a failure.
Line = Piece | float | Exception
HELLO = (Piece("Hel"), Piece("lo."), Piece("", "stop", Usage(7, 2)))


class Puppet:
    """A responder that says its lines, and notes what it was asked and whether it was let go."""

    name, fingerprint = "puppet", None

    def __init__(
        self,
        lines: Sequence[Line] | Callable[[Prompt], Sequence[Line]] = HELLO,
        *capabilities: str,
    ) -> None:
        self.lines = lines
        self.capabilities = frozenset({"generate", *capabilities})
        self.asked: list[tuple[Prompt, Decoding]] = []
        self.let_go = threading.Event()

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self.asked.append((prompt, decoding))
        try:
            for line in self.lines(prompt) if callable(self.lines) else self.lines:
                if isinstance(line, Exception):
                    raise line
                if isinstance(line, float):
                    await asyncio.sleep(line)
                else:
                    yield line
        except (asyncio.CancelledError, GeneratorExit):
            self.let_go.set()
            raise

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        found = [piece async for piece in self.stream(prompt, decoding)]
        last = found[-1]
        return Reply(
            "".join(piece.text for piece in found),
            last.finish or "stop",
            last.usage or Usage(),
            logprobs=tuple(one for piece in found for one in piece.logprobs) or None,
            withheld_by=last.withheld_by,
        )


@dataclass(frozen=True)
class Instead:
    """A guard's decision: what is said, or what is asked instead."""

    text: str = ""


@dataclass(frozen=True)
class Otherwise:
    prompt: Prompt


class Watched(Puppet):
    """A puppet with a guard: its decisions, and targets that can be changed."""

    guard = "names"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.targets = {"Ada Brook"}

    async def check(self, prompt: Prompt, answer: str | None = None) -> Instead | Otherwise | None:
        said = " ".join([*(turn.text for turn in prompt.messages), prompt.text or "", answer or ""])
        if "broken" in said:
            raise Unanswered("the guard failed.", status=503)
        if any(target in said for target in self.targets):
            return Instead("No.")
        return Otherwise(prompt) if "rewrite" in said else None

    async def change_targets(self, add: Sequence[str], remove: Sequence[str]) -> int:
        self.targets = (self.targets | set(add)) - set(remove)
        return len(self.targets)


class Working:
    """A gateway that serves.

    Attributes:
        url: Where its API is.
        root: The same without ``/v1``.
        client: A plain client of it.
    """

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.client = httpx2.Client(base_url=self.root, timeout=20, trust_env=False)

    def chat(self, content: Any = "Hi", **more: Any) -> httpx2.Response:
        headers = more.pop("headers", None)
        body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def events(self, **more: Any) -> list[Any]:
        """The data of a stream, ``[DONE]`` and comments as they stand."""
        text = self.chat(**{"stream": True, **more}).text
        found: list[Any] = []
        for block in filter(None, text.split("\n\n")):
            if not block.startswith("data: "):
                found.append(block)
                continue
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        return found


@contextmanager
def working(system: Any, *, name: str = "m", **settings: Any) -> Iterator[Working]:
    made = GatewaySettings(**{"port": 0, "shutdown_seconds": 5.0, **settings})
    served = server([ServedModel(name, system, made)], made)
    place = listening(made)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    try:
        while not served.started:
            assert thread.is_alive()
            time.sleep(0.005)
        at_work = Working(place.getsockname()[1])
        with at_work.client:
            yield at_work
    finally:
        served.should_exit = True
        thread.join(10)
        place.close()
        assert not thread.is_alive()


class Upstream:
    """A server that sends bytes as they stand.

    Args:
        sent: Of the body that came: bytes, seconds to wait; "hang" waits until the client leaves.
    """

    def __init__(self, sent: Callable[[dict[str, Any]], Sequence[bytes | float | str]]) -> None:
        self.sent = sent
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self._place = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._place.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._place.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._place.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(10)
            head, body = b"", b""
            while b"\r\n\r\n" not in head:
                if not (more := connection.recv(65536)):
                    return
                head += more
            head, _, body = head.partition(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            length = [line for line in lines if line.startswith("content-length:")]
            while length and len(body) < int(length[0].split(":")[1]):
                body += connection.recv(65536)
            asked = json.loads(body) if body else {}
            self.asked.append(asked)
            for one in self.sent(asked):
                if isinstance(one, bytes):
                    connection.sendall(one)
                elif isinstance(one, float):
                    time.sleep(one)
                elif connection.recv(1) == b"":
                    self.left.set()


def whole(content: Any, status: int = 200, **headers: str) -> bytes:
    """A whole reply."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


STREAM = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n"


def said(text: str | None = None, **more: Any) -> bytes:
    """An event of a stream."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": {**delta, **more.pop("delta", {})}, **more}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def answer(text: str = "Hello.", **message: Any) -> dict[str, Any]:
    """A whole completion."""
    about = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {"choices": [{"message": about, "finish_reason": "stop"}], "usage": usage}


@contextmanager
def before(
    sent: Callable[[dict[str, Any]], Sequence[bytes | float | str]], **settings: Any
) -> Iterator[tuple[Working, Upstream]]:
    """A gateway before a server."""
    upstream = Upstream(sent)
    try:
        with working(Endpoint(upstream.url, "up"), **settings) as at_work:
            yield at_work, upstream
    finally:
        upstream.close()
