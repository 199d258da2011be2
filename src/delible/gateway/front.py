"""Around every call: its number, who calls and what they may use, its line of log.

A plain ASGI application: what stands between a client and a stream must not hide that the client
left.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from delible.gateway.answering import failure
from delible.gateway.errors import CallFailed
from delible.gateway.keys import Caller, Callers
from delible.gateway.settings import GatewaySettings
from delible.gateway.telling import Call, Numbers

logger = logging.getLogger(__name__)

#: Where a call stands in an ASGI scope.
CALL = "delible.call"


class Front:
    """The application before the application.

    Args:
        app: What answers.
        settings: With limits, and the file of keys.
        numbers: Where calls are counted.
        callers: Who may call.
    """

    def __init__(
        self, app: ASGIApp, settings: GatewaySettings, numbers: Numbers, callers: Callers
    ) -> None:
        self.app, self.settings, self.numbers = app, settings, numbers
        self.callers = callers
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): one.decode("latin-1") for name, one in scope["headers"]}
        call = Call.of(headers.get("x-request-id", ""))
        scope[CALL] = call

        ended = False
        entered: Caller | None = None

        def leave() -> None:
            nonlocal entered
            if entered is not None:
                self._under_way -= 1
                entered.leave()
                entered = None

        async def told(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                call.status = message["status"]
                own = (b"x-request-id", call.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            elif not message.get("more_body"):
                ended = True
                leave()  # before the client hears that its answer is whole: it may call again now
            await send(message)

        self.numbers.under_way.inc()
        try:
            if scope["path"].startswith("/v1/"):
                call.caller = self.callers.of(headers)
                if scope["method"] == "POST":
                    entered = self._enter(call.caller)
            await self.app(scope, receive, told)
        except CallFailed as failed:
            call.failed = failed.code or str(failed.status)
            await failure(failed)(scope, receive, told)
        except ClientDisconnect:
            call.gone = True
        except Exception as error:
            call.failed = "internal_error"
            logger.error("call %s failed (%s)", call.id, type(error).__name__)
            logger.debug("how it failed", exc_info=error)
            if not call.status:
                broken = CallFailed(500, "Something failed here.", code="internal_error")
                await failure(broken)(scope, receive, told)
            elif not ended:  # too late for a status: the connection is closed
                raise
        finally:
            self.numbers.under_way.dec()
            leave()
            route = _route(scope)
            self.numbers.count(call, route)
            call.log(scope["method"], route)

    def _enter(self, caller: Caller) -> Caller:
        if self._under_way >= self.settings.concurrency:
            raise CallFailed(
                429, "Too many calls are under way here.", code="overloaded", wait_seconds=1.0
            )
        caller.enter()
        self._under_way += 1
        return caller


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route as it is declared: paths that clients make up are one."""
    return getattr(scope.get("route"), "path", "other")
