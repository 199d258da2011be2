"""What a gateway serves: systems by the names that clients know them by."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from delible.gateway.errors import CallFailed
from delible.gateway.guarding import Checking, Following, Retargeted, layers
from delible.gateway.settings import GatewaySettings
from delible.system.base import Responder, System
from delible.systems.completions import CallError
from delible.systems.endpoint import Endpoint
from delible.systems.opening import is_address
from delible.systems.serving import responder

#: Seconds that the answer to "are you ready?" holds.
_READY_SECONDS = 5.0


class ServedModel:
    """A system under a name, made ready for many clients.

    Servers behind it get connections enough, one attempt for each call (clients try again
    themselves), and every option as the client gave it.

    Args:
        name: What clients call it.
        system: What is served, with all its layers.
        settings: Of the gateway.

    Attributes:
        answers: The system as it is asked.
        created: Seconds since 1970.
        endpoint: The server behind it, if there is one: it knows fields that others do not.
        checks: What gives verdicts, by name, the outermost first.
        guard: The names of all guards.
        targets: What takes other targets, if something does.
        following: What goes by a file that may change.
    """

    def __init__(self, name: str, system: System | Responder, settings: GatewaySettings) -> None:
        self.name, self.system = name, system
        self.answers = responder(system)
        self.created = int(time.time())
        found = list(layers(system))
        self.endpoint = next((one for one in found if isinstance(one, Endpoint)), None)
        # an endpoint's own ``check`` is another thing: whether the server is there
        self.checks: list[tuple[str, Checking]] = [
            (_named(one), one) for one in found if iscoroutinefunction(getattr(one, "check", None))
        ]
        self.targets = next((one for one in found if isinstance(one, Retargeted)), None)
        self.following = [one for one in found if isinstance(one, Following)]
        #: Whether a part stands before the model or the server.
        self.guarded = len(found) > 1 or bool(self.checks)
        guards = [one.guard for one in found if isinstance(getattr(one, "guard", None), str)]
        self.guard = "+".join(guards) or "guard"
        self._ready = (0.0, False)
        if self.endpoint is not None:
            self.endpoint.adapts = False
            server = self.endpoint.server
            server.attempts, server.concurrency = 1, settings.concurrency
            server.connect_seconds = settings.connect_seconds
            # the gateway's own limits come first, and say which one it was
            server.timeout_seconds = 5.0 + max(settings.first_token_seconds, settings.idle_seconds)

    def can(self, what: str) -> bool:
        """Whether it does ``"tools"`` or ``"logprobs"``; the outermost layer decides."""
        if what == "logprobs" and isinstance(self.system, Endpoint):
            return True
        return what in getattr(self.system, "capabilities", ())

    def described(self) -> dict[str, Any]:
        """The entry of ``/v1/models``."""
        about = {"id": self.name, "object": "model", "created": self.created}
        return {**about, "owned_by": "delible"}

    async def ready(self) -> bool:
        """Whether it would answer now: a server behind it is asked for its models, not often."""
        endpoint = self.endpoint
        if endpoint is None:
            return True
        when, known = self._ready
        if time.monotonic() - when > _READY_SECONDS or not known:
            try:
                await endpoint.server.get("/models")
                known = True
            except CallError as failed:
                known = failed.status is not None and failed.status < 500
            self._ready = (time.monotonic(), known)
        return known

    async def aclose(self) -> None:
        """Lets go of connections and threads."""
        if self.endpoint is not None:
            await self.endpoint.aclose()
        for one in {id(one): one for one in (self.answers, *layers(self.system))}.values():
            close = getattr(one, "close", None)
            if close is not None and not isinstance(one, Endpoint):
                close()


def _named(system: Any) -> str:
    name = getattr(system, "guard", None)
    return name if isinstance(name, str) else "guard"


def name_for(target: str, system: System | Responder) -> str:
    """The name that clients call a target by: that of the server's model, or the folder's own."""
    if is_address(target):
        found = [one.model for one in layers(system) if isinstance(one, Endpoint)]
        return found[0] if found else "default"
    name = Path(target).name if Path(target).expanduser().exists() else target
    return re.sub(r"[^A-Za-z0-9._:/-]+", "-", name) or "default"


def chosen(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The model of a call.

    Raises:
        CallFailed: There is no such model, or several and none is named.
    """
    if name is None and len(models) == 1:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    if name is None:
        raise CallFailed(400, "The model is missing.", code="missing_model", param="model")
    raise CallFailed(
        404, f"The model '{name[:100]}' does not exist.", code="model_not_found", param="model"
    )
