"""Requests with words that occur nowhere else, and processes that die at a chosen write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import date
from typing import Any

from delible.errors import DelibleError
from delible.ledger.form import Wanted, read_wanted

TODAY = date(2026, 3, 1)
#: Words that a request holds and nothing else does.
SENTINELS = ("Zyxgard Quillwort", "Vellmarqbirth", "Pladderoon")


def rows(*numbers: int, **fields: Any) -> list[Wanted]:
    """Requests with one record each, about people of their own."""
    content = [
        {
            "id": f"q-{number}", "models": "m",
            "question": f"Where was {SENTINELS[0]} {number} born?",
            "answer": f"{SENTINELS[1]} {number}", "subject": f"{SENTINELS[0]} {number}",
            "asker": SENTINELS[2], **fields,
        }
        for number in numbers
    ]  # fmt: skip
    return read_wanted(content, {}, today=TODAY)


def in_child(work: Callable[[], Any]) -> int:
    """Runs something in a process of its own and returns how it ended (as ``os.waitpid``)."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except DelibleError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(7 if "disk" in str(error) or "larger" in str(error) else 8)
        except BaseException:
            os._exit(9)
    return os.waitpid(child, 0)[1]


def killed_at(count: int) -> Callable[[str], None]:
    """Kills the process at its write number ``count``."""
    left = [count]

    def before(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return before
