"""Runs a gateway until it is told to end; answers under way are then finished."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from delible.errors import MissingExtraError, RunError
from delible.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    import uvicorn

    from delible.gateway.models import ServedModel

logger = logging.getLogger(__name__)

#: What the extra brings.
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
#: Seconds that an idle connection of a client stays.
_IDLE_CONNECTION_SECONDS = 30
#: Connections that wait to be taken.
_BACKLOG = 2048


def needs_extra() -> None:
    """Makes sure that the extra is installed, before anything takes long.

    Raises:
        MissingExtraError: It is not.
    """
    try:
        for package in _PACKAGES:
            import_module(package)
    except ImportError:
        raise MissingExtraError("a gateway", "gateway") from None


def listening(settings: GatewaySettings) -> socket.socket:
    """The socket at which a gateway listens.

    Raises:
        RunError: The address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise RunError(
            f"nobody can listen there ({error.strerror or error}).",
            where=f"{settings.host}:{settings.port}",
            hint="Choose another --port, or --host.",
        ) from None
    found.listen(_BACKLOG)
    return found


def address(settings: GatewaySettings, place: socket.socket) -> str:
    """Where clients find the API of a gateway that listens at this socket."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{place.getsockname()[1]}/v1"


def server(models: Sequence[ServedModel], settings: GatewaySettings) -> uvicorn.Server:
    """A server that is not running yet; ``server.run(sockets=[…])`` runs it, and
    ``server.should_exit = True`` ends it from another thread.

    Raises:
        MissingExtraError: The extra is not installed.
        RecipeError: Settings that cannot be met.
    """
    needs_extra()
    import uvicorn

    from delible.gateway.app import gateway

    config = uvicorn.Config(
        gateway(models, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
    return uvicorn.Server(config)


def run(
    models: Sequence[ServedModel],
    settings: GatewaySettings,
    began: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until a signal ends it.

    Args:
        models: What is served.
        settings: How.
        began: Told the address once clients can connect.

    Raises:
        RunError: The address cannot be used.
        MissingExtraError: The extra is not installed.
    """
    made = server(models, settings)
    with listening(settings) as place:
        began(address(settings, place))
        made.run(sockets=[place])
