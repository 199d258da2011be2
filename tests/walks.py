"""Executes the walks of the documentation: console blocks, command by command, as they stand.

``default`` is a tiny model here that was taught the facts of the walks; everything else is real. A
page's line must be printed, in order; ``…`` stands for anything (a whole line: for any lines), and
digits and widths of columns may be others.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

import pytest

from delible.cli import main

DOCS = Path(__file__).parents[1] / "docs"
#: Programs that are not ours, by name: called with their words.
StandIns = dict[str, Callable[[list[str]], None]]
#: The port of the pages; a free one takes its place.
PORT = "8000"


class Command(NamedTuple):
    """One ``$`` line of a page, with the lines below it.

    Attributes:
        code: Exit code that the page tells (``# exit code 1``); 0 if it tells none.
    """

    line: int
    text: str
    printed: tuple[str, ...]
    code: int


def commands(page: Path, title: str = "A walk") -> list[Command]:
    """The commands of a page's walk: the section of that title up to the next of its level."""
    found: list[Command] = []
    inside = block = False
    lines = page.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("## ") and not block:
            inside = line == f"## {title}"
        elif inside and line.startswith("```"):
            block = not block and line == "```console"
        elif block and line.startswith("$ "):
            text, start = line[2:], number
            while _goes_on(text):
                text += "\n" + lines[number]
                number += 1
            code = re.search(r"# exit code (\d+)", text)
            found.append(Command(start, text, (), int(code[1]) if code else 0))
        elif block and line.strip():
            if not found:
                raise ValueError(f"{page.name}:{number} stands below no command.")
            found[-1] = found[-1]._replace(printed=(*found[-1].printed, line))
    return found


def _goes_on(text: str) -> bool:
    """Whether a command goes on in the next line."""
    if text.endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation that is not closed
        return True
    return False


def masked(line: str) -> str:
    """A line in which only words count: digits are alike, and so are spaces."""
    return re.sub(r"\s+", " ", re.sub(r"\d+", "0", line)).strip()


def missing(printed: Sequence[str], out: str) -> str | None:
    """The first line of a page that is not printed in its place; None if all are."""
    have = [masked(line) for line in out.splitlines()]
    place = 0
    for line in printed:
        if line.strip() == "…":
            continue
        parts = re.split(r"\s*…\s*", masked(line))
        wanted = re.compile(".*".join(re.escape(part) for part in parts))
        place = next((at for at in range(place, len(have)) if wanted.fullmatch(have[at])), -1) + 1
        if not place:
            return line
    return None


@dataclass
class Walk:
    """A walk in a folder of its own.

    Attributes:
        stand_ins: Programs that are not Python's, by name: called with the command's words.
    """

    folder: Path
    port: int
    stand_ins: StandIns = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    servers: list[tuple[Any, threading.Thread]] = field(default_factory=list)
    stream: io.StringIO = field(default_factory=io.StringIO)

    def said(self) -> str:
        """What was printed since the last call; both streams, in order."""
        heard = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return heard

    def go(self, page: Path) -> None:
        """Runs every command of a page.

        Raises:
            AssertionError: One ends with another exit code, or does not print what the page says.
        """
        found = commands(page)
        assert found, f"{page.name} has no walk"
        for command in found:
            where = f"{page.name}:{command.line}: $ {command.text}"
            with redirect_stdout(self.stream), redirect_stderr(self.stream):
                code, out = self.run(command)
            assert code == command.code, f"{where}\nexit code {code}:\n{out}"
            absent = missing(command.printed, out)
            assert absent is None, f"{where}\ndoes not print: {absent}\nbut:\n{out}"

    def run(self, command: Command) -> tuple[int, str]:
        """Exit code, and what was printed."""
        text = command.text.replace("\\\n", " ").replace(f":{PORT}", f":{self.port}")
        for name, value in self.environment.items():
            text = text.replace(f"${name}", value)
        program, *words = _globbed(shlex.split(text, comments=True))
        if program == "python" and Path(words[0]).name in self.stand_ins:
            program, *words = Path(words[0]).name, *words[1:]
        self.said()
        match program:
            case "delible" if words[-1:] == ["&"]:
                return 0, self._read(self._serve(words[:-1]))
            case "delible":
                return self._both(main(words))
            case "python":
                return self._both(self._python(words))
            case "export":
                return 0, self._export(text.partition(" ")[2])
            case "cat":
                return 0, self._cat(words, command.printed)
            case "ls":
                names = sorted(one.name for one in Path(words[0] if words else ".").iterdir())
                return 0, "\n".join(names)
            case "curl":
                return 0, self._read(curl(words))
            case "kill":
                self.end()
                return 0, ""
        assert program in self.stand_ins, f"a walk knows no '{program}'"
        self.stand_ins[program](words)
        return 0, ""

    def _both(self, code: int) -> tuple[int, str]:
        return code, self._read(self.said())

    def _read(self, out: str) -> str:
        return out.replace(str(self.port), PORT)

    def _cat(self, words: Sequence[str], printed: Sequence[str]) -> str:
        """A file that is not there is made: the page shows what is in it."""
        (name,) = words
        path = Path(name)
        if not path.exists():
            assert not any("…" in line for line in printed), f"{name} is not whole"
            path.write_text("\n".join(printed) + "\n", "utf-8")
        return path.read_text("utf-8")

    def _python(self, words: list[str]) -> int:
        before, sys.argv = sys.argv, words
        try:
            runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = before
        return 0

    def _export(self, given: str) -> str:
        """``NAME=value`` or ``NAME=$(delible …)``."""
        name, _, value = given.partition("=")
        inner = re.fullmatch(r"\$\(delible (.*)\)", value)
        if inner:
            out = _stdout_alone(lambda: main(shlex.split(inner[1])))
            value = out.strip()
        self.environment[name] = value
        os.environ[name] = value
        return self._read(self.said())

    def _serve(self, words: list[str]) -> str:
        """A server in a thread; what it said until it answers."""
        from delible.gateway import running

        made: list[Any] = []
        build = running.server

        def noted(*given: Any) -> Any:
            made.append(build(*given))
            return made[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "server", noted)
            given = [*words, "--port", str(self.port)]
            thread = threading.Thread(target=main, args=(given,), daemon=True)
            thread.start()
            end = time.monotonic() + 60
            while not (made and made[0].started):
                assert thread.is_alive(), f"the server ended: {self.said()}"
                assert time.monotonic() < end, "the server does not begin"
                time.sleep(0.01)
        self.servers.append((made[0], thread))
        return self.said()

    def end(self) -> None:
        """Ends what is served."""
        for one, thread in self.servers:
            one.should_exit = True
            thread.join(30)
        self.servers.clear()


def _globbed(words: Sequence[str]) -> list[str]:
    """As a shell does: a word with a star is the files that it fits, if there are any."""
    found: list[str] = []
    for word in words:
        fit = (
            sorted(str(one) for one in Path().glob(word)) if "*" in word and " " not in word else []
        )
        found += fit or [word]
    return found


def _stdout_alone(work: Callable[[], object]) -> str:
    with redirect_stdout(io.StringIO()) as stream:
        work()
    return stream.getvalue()


def curl(words: Sequence[str]) -> str:
    """A call over HTTP, by the options ``-s``, ``-N``, ``-i``, ``-H`` and ``-d`` of curl."""
    headers, data, url, head = {}, None, "", False
    rest = iter(words)
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(":")
            headers[name.strip()] = value.strip()
        elif word == "-d":
            data = next(rest).encode()
        elif word == "-i":
            head = True
        elif not word.startswith("-"):
            url = word if "://" in word else f"http://{word}"
    asked = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as reply:
            told, text = f"HTTP/1.1 {reply.status} {reply.reason}\n", reply.read().decode()
    except HTTPError as error:
        told, text = f"HTTP/1.1 {error.code} {error.reason}\n", error.read().decode()
    return f"{told if head else ''}{text}"


@contextmanager
def walking(folder: Path, port: int, stand_ins: StandIns) -> Iterator[Walk]:
    """A walk whose servers end with it."""
    walk = Walk(folder, port, stand_ins)
    try:
        yield walk
    finally:
        walk.end()
