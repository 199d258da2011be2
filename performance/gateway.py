"""What the gateway adds to a stream: ``python performance/gateway.py``.

A scripted server streams an answer of 40 tokens, one every 50 ms (``--pause``), each with the time
at which it was sent. Clients in a process of their own read it three ways, in turns within one run:
directly, through a plain reverse proxy (a pipe of bytes between two sockets), and through the
gateway. What is told is the time from sending a token to reading it, and that of the first one from
the call; what is added is against the proxy. The processor time per token depends less on what else
the machine does. Then many streams at once, for a bounded time: none may be lost. Each part is a
process, so they share the machine's cores as they would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil

TOKENS = 40
HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n"
LIMIT_SECONDS = 300


async def upstream(tokens: int, pause: float) -> None:
    """A server that streams the time of each token."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
            await reader.readexactly(length)
            writer.write(HEAD)
            for _ in range(tokens):
                text = f"{time.monotonic():.6f} "
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


def gateway(port: int) -> None:
    """The gateway before the scripted server."""
    from delible.gateway.models import ServedModel
    from delible.gateway.running import run
    from delible.gateway.settings import GatewaySettings
    from delible.systems.endpoint import Endpoint

    settings = GatewaySettings(port=0, concurrency=4096)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m")
    model = ServedModel("m", endpoint, settings)
    run([model], settings, lambda url: print(url.split(":")[-1].split("/")[0], flush=True))


async def stream(port: int, until: float) -> tuple[float, list[float], bool]:
    """Seconds to the first token, those of each from sending to reading, and whether it ended."""
    began, first, late, ended = time.monotonic(), 0.0, list[float](), False
    with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(until):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps(
                {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
            ).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            )
            writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
            async for line in _lines(reader):
                now = time.monotonic()
                if line == b"data: [DONE]":
                    ended = True
                    break
                delta = json.loads(line[6:])["choices"][0]["delta"] if line[:6] == b"data: " else {}
                for sent in (delta.get("content") or "").split():
                    first = first or now - began
                    late.append(now - float(sent))
            writer.close()
    return first, late, ended and len(late) == TOKENS


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield line.strip()


async def clients(port: int, count: int, spread: float) -> dict[str, float]:
    """Streams at once, begun within ``spread`` seconds."""

    async def one(place: int) -> tuple[float, list[float], bool]:
        await asyncio.sleep(spread * place / count)
        return await stream(port, LIMIT_SECONDS)

    began = time.monotonic()
    found = await asyncio.gather(*map(one, range(count)))
    late = sorted(one for _, times, _ in found for one in times)
    first = sorted(one for one, _, _ in found)
    return {
        "lost": sum(not ended for *_, ended in found),
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
            gateway(int(numbers[0]))
        else:
            port, count, spread = int(numbers[0]), int(numbers[1]), float(numbers[2])
            print(json.dumps(asyncio.run(clients(port, count, spread))))
        return
    processes: list[subprocess.Popen[str]] = []

    def start(*words: object) -> int:
        process = subprocess.Popen(
            [sys.executable, Path(__file__), *map(str, words)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def ask(port: int, count: int, spread: float) -> dict[str, float]:
        words = [sys.executable, Path(__file__), "clients", str(port), str(count), str(spread)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return {name: float(one) for name, one in json.loads(done.stdout).items()}

    try:
        direct = start("upstream", given.pause)
        ways = {
            "direct": direct,
            "proxy": start("proxy", direct),
            "gateway": start("gateway", direct),
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
        added = {c: middle["gateway"][c] - middle["proxy"][c] for c in columns[:-1]}
        print("added to the proxy: " + ", ".join(f"{c} {v:.1f} ms" for c, v in added.items()))
        slow = start("upstream", 0.5)
        for name in ("proxy", "gateway") if given.many else ():
            way = start(name, slow)
            found = ask(way, given.many, 10.0)
            print(
                f"{given.many} streams through the {name}: {found['lost']:.0f} lost in "
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
