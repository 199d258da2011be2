"""Runs a program that a model wrote, in a process that can do nothing but compute.

The process (:mod:`delible.acting.confined`) has no network, no file besides its own program and the
standard library, no other process, no environment and no open file of ours. Time, memory and output
have limits. Where a kernel cannot hold all of that, nothing is run: :func:`why_not` says why.

What a program can still learn: whether a path exists, and the time. What it cannot: write a byte
anywhere but to its own output.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from delible.component import Config
from delible.errors import RunError

Ended = Literal["finished", "raised", "forbidden", "time", "memory", "output", "crashed"]
#: What runs inside; not imported, since it is a script, and of one system.
CONFINED = Path(__file__).with_name("confined.py")
#: Its exit codes for what was refused, and for too little memory.
FORBIDDEN, MEMORY = 77, 78
#: Wall-clock seconds per second of the limit, and besides: for machines that do other work, too.
PATIENCE, GRACE_SECONDS = 3.0, 5.0
_CHUNK = 65536


class Limits(Config):
    """What one run may use."""

    seconds: float = Field(5.0, gt=0, le=600, description="Processor seconds of a run at most.")
    megabytes: int = Field(
        512, ge=4, description="Memory of a run at most, besides what starting Python takes."
    )
    output_bytes: int = Field(65_536, ge=1, description="What a run may write at most.")


@dataclass(frozen=True)
class Ran:
    """What came of a run.

    Attributes:
        ended: ``finished``; ``raised`` an exception, or left with an exit code; ``forbidden``: it
            was refused something; more ``time``, ``memory`` or ``output`` than allowed; ``crashed``
            by a signal.
        output: What it wrote to its output.
        errors: What it wrote to its error output.
        seconds: Processor seconds, as the kernel counted them; starting Python is among them.
    """

    ended: Ended
    output: str
    errors: str
    seconds: float


def run(program: str, given: str = "", limits: Limits | None = None) -> Ran:
    """Runs a Python program.

    Args:
        program: Its source. Only the standard library is there.
        given: Its input.

    Raises:
        RunError: This machine cannot confine it; it was not run.
    """
    reason = why_not()
    if reason is not None:
        raise RunError(
            f"programs that a model wrote are not run here: {reason}.",
            where="sandbox",
            hint="It takes Linux 6.2 or newer with Landlock and seccomp (in a container: a profile "
            "that allows both).",
        )
    return _run(program, given, limits or Limits())


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why this machine cannot confine a program; None: it can, and it was tried."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has neither Landlock nor seccomp"
    try:
        tried = _run(_TRIAL.format(outside=str(Path(__file__).resolve())), "", Limits())
    except RunError as error:
        return error.problem
    if (tried.ended, tried.output) != ("finished", "confined\n"):
        return f"a program that was tried got out, or did not run ({tried.ended}: {tried.output!r})"
    return None


#: Tries what no program may do; writes what it could do all the same.
_TRIAL = """
import os, socket
def tried(what, work):
    try:
        work()
    except PermissionError:
        return
    print(what)
tried("read", lambda: open({outside!r}).read())
tried("listed", lambda: os.listdir("/"))
tried("socket", lambda: socket.socket())
tried("fork", lambda: os.fork() or os._exit(0))
tried("signal", lambda: os.kill(os.getppid(), 0))
print("confined")
"""


def _run(program: str, given: str, limits: Limits) -> Ran:
    with tempfile.TemporaryDirectory(prefix="delible-sandbox-") as folder:
        path = Path(folder).resolve() / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        told, tells = os.pipe()
        most = -int(-limits.seconds // 1)
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CONFINED),
                 str(path), str(tells), str(most), str(limits.megabytes * 2**20)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=(tells,), cwd=folder, env={"PYTHONHASHSEED": "0"}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(told)
            raise RunError(f"Python cannot be started ({error})", where="sandbox") from None
        finally:
            os.close(tells)
        try:
            return _watched(process, told, given.encode(errors="replace"), limits)
        except BaseException:  # an interruption, too, leaves nothing running
            process.kill()
            process.wait()
            raise
        finally:
            os.close(told)


def _watched(process: subprocess.Popen[bytes], told: int, given: bytes, limits: Limits) -> Ran:
    """Feeds and reads a process until it ends, or is ended."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    source, out, err = (one.fileno() for one in (process.stdin, process.stdout, process.stderr))
    read = {place: bytearray() for place in (out, err, told)}
    deadline = time.monotonic() + PATIENCE * limits.seconds + GRACE_SECONDS
    cut: Ended | None = None
    rest = memoryview(given)
    gone = os.pidfd_open(process.pid)
    os.set_blocking(source, False)
    with selectors.DefaultSelector() as waits:
        for place in (*read, gone):
            waits.register(place, selectors.EVENT_READ)
        waits.register(source, selectors.EVENT_WRITE)
        while waits.get_map():
            events = waits.select(max(0.0, deadline - time.monotonic()))
            if not events:
                cut, deadline = cut or "time", deadline + GRACE_SECONDS
                process.kill()
            for key, _ in events:
                if key.fd in read:
                    piece = os.read(key.fd, _CHUNK)
                    read[key.fd] += piece
                    more = bool(piece)
                elif key.fd == source:
                    rest = _fed(source, rest)
                    more = bool(rest)
                else:
                    more = False
                if not more:
                    waits.unregister(key.fd)
                    if key.fd == source:
                        process.stdin.close()
            if cut is None and len(read[out]) + len(read[err]) > limits.output_bytes:
                cut = "output"
                process.kill()
    os.close(gone)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    if bytes(read[told]) != b"\0":
        reason = bytes(read[told] or read[err])[-300:].decode(errors="replace").strip()
        raise RunError(f"it cannot be confined ({reason or 'Python did not start'})")
    spent = used.ru_utime + used.ru_stime
    output, errors = (
        bytes(read[one][: limits.output_bytes]).decode(errors="replace") for one in (out, err)
    )
    return Ran(cut or _ended(process.returncode, spent, limits), output, errors, spent)


def _fed(place: int, rest: memoryview) -> memoryview:
    """Writes as much as is taken; what is left, nothing where nobody reads any more."""
    try:
        return rest[os.write(place, rest[:_CHUNK]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]


def _ended(code: int, spent: float, limits: Limits) -> Ended:
    """What an exit code says; a signal's is negative."""
    if spent > limits.seconds or code == -signal.SIGXCPU:
        return "time"
    if code == -signal.SIGKILL:  # the machine had no memory left
        return "memory"
    known: dict[int, Ended] = {
        0: "finished", FORBIDDEN: "forbidden", MEMORY: "memory"
    }  # fmt: skip
    return "crashed" if code < 0 else known.get(code, "raised")


__all__ = ["Ended", "Limits", "Ran", "run", "why_not"]
