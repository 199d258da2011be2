"""A small OpenAI-compatible server in a thread, whose replies a test writes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


@dataclass
class Reply:
    """What the server answers: a completion with a text, or a status with a body.

    ``broken`` closes the connection instead: before the reply ("drop") or within it ("cut").
    ``sent`` is a stream, sent chunk by chunk as it stands; with ``held`` the server then waits
    until the client hangs up.
    """

    text: str | None = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    message: dict[str, Any] | None = None
    broken: Literal["", "drop", "cut"] = ""
    sent: Sequence[bytes] | None = None
    held: bool = False


@dataclass
class Asked:
    """One request as it came in."""

    method: str
    path: str
    body: dict[str, Any]
    key: str


class Server:
    """Replies with ``script(asked)``; keeps what it was asked and how many at once."""

    models: tuple[str, ...] = ("small", "large")

    def __init__(self, script: Callable[[Asked], Reply]) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.running = self.most_at_once = 0
        self.lock = threading.Lock()
        self.hung_up = threading.Event()
        self.url = ""

    def questions(self) -> list[Asked]:
        """The requests for an answer, without those that check the server."""
        return [one for one in self.asked if one.method == "POST" and not is_probe(one)]


def is_probe(asked: Asked) -> bool:
    return asked.body.get("messages") == [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(script: Callable[[Asked], Reply]) -> Iterator[Server]:
    server = Server(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            key = self.headers.get("Authorization", "")
            asked = Asked(self.command, self.path, body, key)
            with server.lock:
                server.asked.append(asked)
                server.running += 1
                server.most_at_once = max(server.most_at_once, server.running)
            reply = self.models() if self.path == "/v1/models" else server.script(asked)
            if reply.sent is not None:
                self.stream(reply)
                return
            content = reply.body if reply.body is not None else completion(asked, reply)
            with server.lock:
                server.running -= 1
            if reply.broken:
                self.hang_up(content if reply.broken == "cut" else b"")
                return
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has given up
                self.close_connection = True

        def stream(self, reply: Reply) -> None:
            with server.lock:
                server.running -= 1
            self.close_connection = True
            if reply.sent:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                for name, value in {"Connection": "close", **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
            for chunk in reply.sent or ():
                self.wfile.write(chunk)
                self.wfile.flush()
                time.sleep(0.002)  # so that chunks arrive apart
            if reply.held:
                self.connection.settimeout(10)
                if self.connection.recv(1) == b"":
                    server.hung_up.set()

        def hang_up(self, content: bytes) -> None:
            if content:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def models(self) -> Reply:
            listed = {"data": [{"id": name} for name in server.models]}
            return Reply(body=json.dumps(listed).encode())

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(asked: Asked, reply: Reply) -> bytes:
    choice: dict[str, Any] = {"finish_reason": reply.finish}
    if asked.path.endswith("/chat/completions"):
        choice["message"] = reply.message or {"role": "assistant", "content": reply.text}
    else:
        choice["text"] = reply.text
    return json.dumps({"choices": [choice]}).encode()
