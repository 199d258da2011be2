"""What the gateway adds to a stream: ``python performance/gateway.py``.

A scripted server streams an answer of 40 tokens, one every 50 ms (``--pause``), each with the time
at which it was sent. Clients in a process of their own read it three ways, in turns within one run:
directly, through a plain reverse proxy (a pipe of bytes between two sockets), and through the
gateway, without a guard and with `target_detector` by the names of 10,000 targets (`--similarity`
compares meanings, too, which costs the sentence encoder's time before the first token). What is
told is the time from sending a token to reading it, and that of the first one from
the call; what is added is against the proxy. The processor time per token depends less on what else
the machine does. Then many streams at once, for a bounded time: none may be lost, and of every
tenth, in which the server says the name of a target, cut in three, nothing of it may come through
the guard. Each part is a process, so they share the machine's cores as they would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TOKENS = 40
#: What the server says to whom asks for it, in the middle of its answer; and what a client of a
#: guarded gateway must not read.
NAME = ("Ada ", "Br", "ook ")
HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n"
LIMIT_SECONDS = 300


async def upstream(tokens: int, pause: float) -> None:
    """A server that streams the time of each token."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
            bad = b"leak" in await reader.readexactly(length)
            writer.write(HEAD)
            for place in range(tokens):
                text = f"{time.monotonic():.6f} "
                if bad and tokens // 2 <= place < tokens // 2 + len(NAME):
                    text = NAME[place - tokens // 2]
                chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
                writer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                await writer.drain()
                await asyncio.sleep(pause)
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            writer.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
            await writer.drain()
        writer.close()

    await _serve(one)


async def proxy(port: int) -> None:
    """Bytes from here to there and back."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        sending = asyncio.create_task(pipe(reader, back))
        await pipe(there, writer)
        sending.cancel()

    await _serve(one)


async def _serve(one: object) -> None:
    server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=4096)  # type: ignore[arg-type]
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def gateway(port: int, guard: str) -> None:
    """The gateway before the scripted server, perhaps with a guard."""
    from delible.gateway.models import ServedModel
    from delible.gateway.running import run
    from delible.gateway.settings import GatewaySettings
    from delible.records import QA, ForgetRequest
    from delible.systems.endpoint import Endpoint
    from delible.systems.guarded import guard as put_before
    from guards import names

    settings = GatewaySettings(port=0, concurrency=4096)
    system: Any = Endpoint(f"http://127.0.0.1:{port}/v1", "m")
    if guard != "none":
        forget = [QA(question="Where was Ada Brook born?", answer="There", subject="Ada Brook")]
        request = ForgetRequest(forget=tuple(forget), subjects=tuple(names(10_000)))
        system = put_before(system, request, similarity=guard == "similarity")
    model = ServedModel("m", system, settings)
    run([model], settings, lambda url: print(url.split(":")[-1].split("/")[0], flush=True))


@dataclass
class Heard:
    """A stream: seconds to the first token, those of each from sending to reading, its text, and
    whether it ended as it should.
    """

    first: float = 0.0
    late: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    done: bool = False

    def ended(self, *, bad: bool) -> bool:
        return self.done and (bad or len(self.late) == TOKENS)


async def stream(port: int, until: float, *, bad: bool = False) -> Heard:
    began, heard, pending = time.monotonic(), Heard(), ""
    with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(until):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps(
                {
                    "model": "m",
                    "stream": True,
                    "messages": [{"role": "user", "content": "leak" if bad else "Hi"}],
                }
            ).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            )
            writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
            async for line in _lines(reader):
                now = time.monotonic()
                if line == b"data: [DONE]":
                    heard.done = True
                    break
                told = json.loads(line[6:])
                if not told.get("choices"):
                    continue  # an error: the stream ends without [DONE], and is lost
                choice = told["choices"][0]
                heard.finish = choice.get("finish_reason") or heard.finish
                text = choice["delta"].get("content") or ""
                heard.text += text
                heard.first = heard.first or (now - began if text else 0.0)
                pending += text  # a number may come in parts, where a guard held the rest
                for one in re.finditer(r"\d+\.\d{6}", pending):
                    heard.late.append(now - float(one.group()))
                pending = re.sub(r".*\d+\.\d{6}", "", pending, flags=re.DOTALL)
            writer.close()
    return heard


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield line.strip()


async def clients(port: int, count: int, spread: float, bad: float = 0) -> dict[str, float]:
    """Streams at once, begun within ``spread`` seconds; every ``bad``-th asks for the name."""

    def leaks(place: int) -> bool:
        return bool(bad) and place % int(bad) == 0

    async def one(place: int) -> Heard:
        await asyncio.sleep(spread * place / count)
        return await stream(port, LIMIT_SECONDS, bad=leaks(place))

    began = time.monotonic()
    found = await asyncio.gather(*map(one, range(count)))
    late = sorted(one for heard in found for one in heard.late)
    first = sorted(heard.first for heard in found)
    return {
        "lost": sum(not heard.ended(bad=leaks(place)) for place, heard in enumerate(found)),
        "leaked": sum(any(part.strip() in one.text for part in NAME) for one in found),
        "withheld": sum(one.finish == "content_filter" for one in found),
        "seconds": time.monotonic() - began,
        **{f"token p{q}": _part(late, q) for q in (50, 99)},
        **{f"first p{q}": _part(first, q) for q in (50, 99)},
    }


def _part(values: list[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return 1000 * values[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two tokens")
    parser.add_argument("--similarity", action="store_true", help="the guard compares meanings")
    parser.add_argument("--many", type=int, default=1000, help="streams at once; 0: leave it out")
    parser.add_argument("part", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        name, *numbers = given.part
        if name == "upstream":
            asyncio.run(upstream(TOKENS, float(numbers[0])))
        elif name == "proxy":
            asyncio.run(proxy(int(numbers[0])))
        elif name == "gateway":
            gateway(int(numbers[0]), numbers[1])
        else:
            port, count, spread, bad = int(numbers[0]), int(numbers[1]), *map(float, numbers[2:])
            print(json.dumps(asyncio.run(clients(port, count, spread, bad))))
        return
    processes: list[subprocess.Popen[str]] = []
    guard = "similarity" if given.similarity else "names"

    def start(*words: object) -> int:
        process = subprocess.Popen(
            [sys.executable, Path(__file__), *map(str, words)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def ask(port: int, count: int, spread: float, bad: int = 0) -> dict[str, float]:
        numbers = map(str, (port, count, spread, bad))
        words = [sys.executable, Path(__file__), "clients", *numbers]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return {name: float(one) for name, one in json.loads(done.stdout).items()}

    try:
        direct = start("upstream", given.pause)
        ways = {
            "direct": direct,
            "proxy": start("proxy", direct),
            "gateway": start("gateway", direct, "none"),
            "guarded": start("gateway", direct, guard),
        }
        workers = dict(zip(ways, map(psutil.Process, (one.pid for one in processes)), strict=True))
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for port in ways.values():
            ask(port, 5, 0.1)  # everything is imported and connected once
        for _ in range(given.rounds):
            for name, port in ways.items():
                before = sum(workers[name].cpu_times()[:2])
                found = ask(port, given.streams, 1.0)
                used = sum(workers[name].cpu_times()[:2]) - before
                measured[name].append(
                    found | {"CPU per token": 1000 * used / (given.streams * TOKENS)}
                )
        print(
            f"{given.streams} streams at once, a token every {given.pause:g} s; medians of "
            f"{given.rounds} rounds, in milliseconds"
        )
        columns = ("token p50", "token p99", "first p50", "first p99", "CPU per token", "lost")
        print("| way | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        middle: dict[str, dict[str, float]] = {}
        for name, rounds in measured.items():
            middle[name] = {
                column: sorted(one[column] for one in rounds)[len(rounds) // 2]
                for column in columns
            }
            row = " | ".join(f"{middle[name][column]:.3g}" for column in columns)
            print(f"| {name} | {row} |")
        for name in ("gateway", "guarded"):
            added = {c: middle[name][c] - middle["proxy"][c] for c in columns[:-1]}
            told = ", ".join(f"{column} {one:.2f}" for column, one in added.items())
            print(f"added by the {name} to the proxy, ms: {told}")
        slow = start("upstream", 0.5)
        for name in ("proxy", "gateway", "guarded") if given.many else ():
            way = (
                start("proxy", slow)
                if name == "proxy"
                else start("gateway", slow, guard if name == "guarded" else "none")
            )
            found = ask(way, given.many, 10.0, 10)
            print(
                f"{given.many} streams through the {name}: {found['lost']:.0f} lost, "
                f"{found['withheld']:.0f} withheld, {found['leaked']:.0f} leaked in "
                f"{found['seconds']:.0f} s; token p50 {found['token p50']:.1f} ms, "
                f"p99 {found['token p99']:.1f} ms"
            )
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    main()
