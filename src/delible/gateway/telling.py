"""What a gateway tells of calls: numbers for Prometheus, and a line of log. Never any content."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from delible.gateway.keys import Caller
from delible.system.replies import Usage

#: One JSON object per call.
access = logging.getLogger("delible.gateway.access")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class Call:
    """A call under way, and what is told of it afterwards.

    Attributes:
        id: That of the client, if it gave a fit one.
        told: Characters that came, where a system tells no tokens.
    """

    id: str
    caller: Caller | None = None
    model: str = ""
    streamed: bool = False
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    status: int = 0
    finishes: list[str] = field(default_factory=list)
    withheld_by: list[str] = field(default_factory=list)
    guard_failed: bool = False
    usage: Usage = field(default_factory=Usage)
    told: int = 0
    warnings: int = 0
    gone: bool = False
    failed: str = ""

    @classmethod
    def of(cls, wanted: str) -> Call:
        """A call with the id that the client wants, or a new one."""
        return cls(wanted if _ID.fullmatch(wanted) else f"req_{uuid.uuid4().hex}")

    def log(self, method: str, route: str) -> None:
        """Writes its line."""
        if not access.isEnabledFor(logging.INFO):
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": self.id,
            "method": method,
            "route": route,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 4),
        }
        more = {
            "key": self.caller.name if self.caller else "",
            "model": self.model,
            "streamed": self.streamed,
            "first_text_seconds": None if self.first is None else round(self.first, 4),
            "finishes": self.finishes,
            "withheld_by": self.withheld_by,
            "guard_failed": self.guard_failed,
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "warnings": self.warnings,
            "client_left": self.gone,
            "failed": self.failed,
        }
        access.info(json.dumps(line | {name: value for name, value in more.items() if value}))


class Numbers:
    """What Prometheus reads. Labels are routes, statuses, guards and verdicts: no target's name,
    no client's, no text.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.calls = Counter("delible_calls", "Calls by route.", ("route", "status"), **own)
        self.seconds = Histogram(
            "delible_call_seconds", "Length of calls.", ("route",), buckets=_SECONDS, **own
        )
        self.first = Histogram(
            "delible_first_text_seconds", "Until an answer began.", buckets=_SECONDS, **own
        )
        self.under_way = Gauge("delible_calls_under_way", "Calls at this moment.", **own)
        self.tokens = Counter("delible_tokens", "Tokens in and out.", ("direction",), **own)
        self.verdicts = Counter(
            "delible_verdicts",
            "Answers by verdict: passed, withheld, failed (the guard broke down, which withheld "
            "them), and checks that allow or refuse.",
            ("guard", "verdict"),
            **own,
        )
        self.left = Counter("delible_clients_left", "Clients that left before the end.", **own)

    def count(self, call: Call, route: str) -> None:
        """Counts a call that has ended."""
        self.calls.labels(route, str(call.status)).inc()
        self.seconds.labels(route).observe(time.monotonic() - call.started)
        if call.first is not None:
            self.first.observe(call.first)
        if call.gone:
            self.left.inc()
        self.tokens.labels("in").inc(call.usage.prompt_tokens)
        self.tokens.labels("out").inc(call.usage.completion_tokens)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
